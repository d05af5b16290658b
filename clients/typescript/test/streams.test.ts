/** Streams: whole, broken and resumed, failed, replayed. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { test } from 'node:test';
import { cancelTurn, type Client, connect, ErrorCode, resume, stream, type TurnEvent } from '@atlus/client';
import { all, both, newSession, nobody, to, world } from './world.js';

/** A message to a new session. */
const request = async (client: Client, model?: string, message = 'Hello') => ({
  client,
  body: { session_id: await newSession(client), message, model },
});

const text = (events: TurnEvent[]) => events.map((event) => event.text).join('');

/** One start, every piece once and in its place, one end that says the same. */
function assertWhole(events: TurnEvent[], expected: string) {
  const [start, ...rest] = events;
  const done = rest.pop();
  assert.ok(start?.event === 'start' && start.data.turn === 1);
  let offset = 0;
  for (const event of rest) {
    assert.equal(event.event, 'delta');
    offset += Buffer.byteLength(event.text);
    assert.equal(event.id, offset);
  }
  assert.ok(done?.event === 'done');
  assert.equal(done.data.response, expected);
  assert.equal(text(events), expected);
}

/** The first events of a stream, which is then left. */
async function some(events: AsyncIterable<TurnEvent>, count: number): Promise<TurnEvent[]> {
  const found: TurnEvent[] = [];
  for await (const event of events) if (found.push(event) === count) break;
  return found;
}

const placeOf = ([start]: TurnEvent[]) => {
  assert.ok(start?.event === 'start');
  return { session_id: start.data.session_id, turn: start.data.turn };
};

for (const server of both) {
  const client = to(server);

  test(`a stream tells start, pieces and answer (${server})`, async () => {
    const ask = await request(client, undefined, 'Hi, my name is John');
    assertWhole(await all(stream(ask)), 'Hello! Nice to meet you, John.');
  });

  test(`a stream with a key is replayed (${server})`, async () => {
    const ask = { ...(await request(client)), headers: { 'Idempotency-Key': randomUUID() } };
    const [first, again] = [await all(stream(ask)), await all(stream(ask))];
    assert.deepEqual(again.at(-1), first.at(-1));
    assert.equal(text(again), text(first));
  });
}

test('a stream that breaks goes on by itself', async () => {
  const events = await all(stream(await request(to('breaking'), 'slow')));
  // It broke several times: after three pieces each.
  assert.ok(events.length > 10);
  assertWhole(events, world.slow_text);
});

test('a stream is given up when told to', async () => {
  const ask = await request(to('breaking'), 'slow');
  await assert.rejects(all(stream({ ...ask, resumes: 0 })), TypeError);
});

test('a stream is resumed elsewhere', async () => {
  const heard = await some(stream(await request(to('modelled'), 'slow')), 5);
  const last = heard.at(-1)?.id;
  const rest = resume({ client: to('modelled'), path: placeOf(heard), headers: { 'Last-Event-ID': last } });
  assertWhole([...heard, ...(await all(rest))], world.slow_text);
});

test('a stream is heard again from the beginning', async () => {
  const first = await all(stream(await request(to('open'))));
  const again = await all(resume({ client: to('open'), path: placeOf(first) }));
  assertWhole(again, text(first));
  const last = first.at(-1)?.id;
  const end = await all(resume({ client: to('open'), path: placeOf(first), headers: { 'Last-Event-ID': last } }));
  assert.deepEqual(end.map(({ event }) => event), ['done']);
});

test('a turn that fails in its stream throws', async () => {
  const events = stream(await request(to('modelled'), 'broken'));
  assert.equal((await events.next()).value?.event, 'start');
  await assert.rejects(all(events), { name: 'AtlusError', code: ErrorCode.UPSTREAM_ERROR, status: 502 });
});

test('a turn that is cancelled in its stream throws', async () => {
  const client = to('modelled');
  const events = stream(await request(client, 'silent'));
  const { value: start } = await events.next();
  assert.ok(start);
  await cancelTurn({ client, path: placeOf([start]) });
  await assert.rejects(all(events), { code: ErrorCode.TURN_CANCELLED });
});

test('a stream that never begins throws', async () => {
  const refused = stream({ client: to('open'), body: { session_id: nobody, message: 'Hi' } });
  await assert.rejects(all(refused), { code: ErrorCode.INVALID_SESSION, status: 404 });
  // Nobody listens there.
  const unheard = stream({ client: connect('http://127.0.0.1:9'), body: { message: 'Hi' } });
  await assert.rejects(all(unheard), TypeError);
});

test('a signal ends a stream', async () => {
  const abort = new AbortController();
  const events = stream({ ...(await request(to('modelled'), 'slow')), signal: abort.signal });
  await events.next();
  abort.abort();
  await assert.rejects(all(events), { name: 'AbortError' });
});
