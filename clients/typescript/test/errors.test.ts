/** Every error code of the contract, brought about on a real server and thrown as a typed error. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { test } from 'node:test';
import {
  AtlusError,
  cancelTurn,
  chat,
  type ChatRequest,
  type Client,
  connect,
  continueSession,
  ErrorCode,
  getSession,
  getTurn,
  getUser,
  listKeys,
  listSessions,
  revokeKey,
  stream,
  updateSession,
} from '@atlus/client';
import { newSession, nobody, to, world } from './world.js';

const say = (server: string | Client, body: Partial<ChatRequest> = {}) =>
  chat({ client: typeof server === 'string' ? to(server) : server, body: { message: 'Hello', ...body } });

/** A session whose turn runs meanwhile. */
async function busy(headers = {}) {
  const client = to('modelled');
  const ask = { client, body: { session_id: await newSession(client), message: 'Hello', model: 'silent' }, headers };
  const events = stream(ask);
  await events.next();
  await events.return();
  return ask;
}

const post = (body: string, type: string) =>
  to('open').post({ url: '/api/v1/chat', body, bodySerializer: null, headers: { 'Content-Type': type } });

async function stalled() {
  const encoder = new TextEncoder();
  const body = new ReadableStream({ start: (controller) => controller.enqueue(encoder.encode('{')) });
  const request = { url: '/api/v1/chat', body, bodySerializer: null, headers: { 'Content-Type': 'application/json' } };
  await to('open').post({ ...request, ...{ duplex: 'half' } });
}

async function turnCancelled() {
  const client = to('modelled');
  const path = { session_id: await newSession(client), turn: 1 };
  const waiting = say(client, { session_id: path.session_id, model: 'silent' });
  // Until the turn runs.
  const cancel = async (): Promise<unknown> => cancelTurn({ client, path }).catch(cancel);
  await Promise.all([waiting, cancel()]);
}

async function overloaded() {
  // One runs and four wait.
  const attempts = await Promise.allSettled(Array.from({ length: 6 }, () => say('crowded')));
  const errors = attempts.map((attempt) => attempt.status === 'rejected' && attempt.reason);
  throw errors.find((error) => error.code === ErrorCode.OVERLOADED);
}

async function twice<Answer>(call: (nth: number) => Promise<Answer>) {
  await call(1);
  await call(2);
}

/** Each by what brings it about, with its status and whether it says when to try again. */
const table: Record<ErrorCode, [number, boolean, () => Promise<unknown>]> = {
  INVALID_CONTENT_TYPE: [400, false, () => post('Hello', 'text/plain')],
  INVALID_JSON: [400, false, () => post('{', 'application/json')],
  VALIDATION_ERROR: [400, false, () => listSessions({ client: to('open'), query: { limit: 0 } })],
  INVALID_REQUEST: [400, false, () => say('open', { message: ' ' })],
  MESSAGE_TOO_LONG: [400, false, () => say('open', { message: 'x'.repeat(32_001) })],
  INVALID_CURSOR: [400, false, () => listSessions({ client: to('open'), query: { cursor: 'made-up' } })],
  UNAUTHORIZED: [401, false, () => listSessions({ client: connect(world.servers.keyed) })],
  FORBIDDEN: [403, false, () => say(connect(world.servers.keyed, world.read_key))],
  SESSION_NOT_FOUND: [404, false, () => getSession({ client: to('open'), path: { session_id: nobody } })],
  INVALID_SESSION: [404, false, () => say('open', { session_id: nobody })],
  NO_SESSION_FOUND: [404, false, () => continueSession({ client: to('open'), query: { user_id: 'user_nobody' } })],
  TURN_NOT_FOUND: [404, false, async () => {
    const client = to('open');
    await getTurn({ client, path: { session_id: await newSession(client), turn: 1 } });
  }],
  USER_NOT_FOUND: [404, false, () => getUser({ client: to('open'), path: { user_id: 'user_nobody' } })],
  KEY_NOT_FOUND: [404, false, () => revokeKey({ client: to('keyed'), path: { key_id: 'key_0000000000000000' } })],
  NOT_FOUND: [404, false, () => to('open').get({ url: '/api/v1/nothing' })],
  METHOD_NOT_ALLOWED: [405, false, () => to('open').put({ url: '/api/v1/chat' })],
  REQUEST_TIMEOUT: [408, false, stalled],
  SESSION_BUSY: [409, true, async () => {
    const { session_id } = (await busy()).body;
    await say('modelled', { session_id, on_busy: 'reject' });
  }],
  TURN_CANCELLED: [409, false, turnCancelled],
  TURN_NOT_RUNNING: [409, false, async () => {
    const { session_id, turn } = (await say('open')).data.data;
    await cancelTurn({ client: to('open'), path: { session_id, turn } });
  }],
  IDEMPOTENCY_IN_PROGRESS: [409, true, async () => stream(await busy({ 'Idempotency-Key': randomUUID() })).next()],
  PRECONDITION_FAILED: [412, false, async () => {
    const client = to('open');
    const path = { session_id: await newSession(client) };
    await updateSession({ client, path, body: { title: 'Names' }, headers: { 'If-Match': '"0000000000000000"' } });
  }],
  PAYLOAD_TOO_LARGE: [413, false, () => say('open', { message: 'x'.repeat(1_100_000) })],
  IDEMPOTENCY_KEY_REUSED: [422, false, () => {
    const headers = { 'Idempotency-Key': randomUUID() };
    return twice((nth) => chat({ client: to('open'), body: { message: `${nth}` }, headers }));
  }],
  RATE_LIMIT_EXCEEDED: [429, true, () => twice(() => listSessions({ client: to('limited') }))],
  TOKEN_BUDGET_EXCEEDED: [429, true, () => {
    const user_id = `user_${randomUUID()}`;
    return twice(() => say('budgeted', { user_id }));
  }],
  INTERNAL_ERROR: [500, false, () => listKeys({ client: to('damaged') })],
  UPSTREAM_ERROR: [502, false, () => say('modelled', { model: 'broken' })],
  UPSTREAM_UNAVAILABLE: [503, true, () => say('modelled', { model: 'patient' })],
  OVERLOADED: [503, true, overloaded],
  DATABASE_UNAVAILABLE: [503, true, () => newSession(to('locked'))],
  UPSTREAM_TIMEOUT: [504, false, () => say('modelled', { model: 'silent' })],
};

// Together, since some take their time.
test('failures are typed errors', { concurrency: true }, async (t) => {
  assert.deepEqual(new Set(Object.keys(table)), new Set(Object.values(ErrorCode)));
  const run = Object.entries(table).map(([code, [status, retry, work]]) =>
    t.test(code, async () => {
      const error = await work().then(
        () => assert.fail('nothing failed'),
        (error: unknown) => error,
      );
      assert.ok(error instanceof AtlusError, String(error));
      assert.equal(error.code, code);
      assert.equal(error.status, status);
      assert.ok(error.message && error.request_id);
      assert.equal(error.retry_after !== undefined, retry);
    }),
  );
  await Promise.all(run);
});

test('an error names the field', async () => {
  const listing = listSessions({ client: to('open'), query: { limit: 0 } });
  await assert.rejects(listing, (error: AtlusError) => error.details[0]?.field === 'limit');
});

test("an answer that is not the server's is an error without a code", async () => {
  for (const body of ['<html>Bad gateway</html>', '{"error": "Bad"}', 'null']) {
    const error = await AtlusError.of(new Response(body, { status: 502 }));
    assert.deepEqual([error.code, error.status, error.details], [undefined, 502, []]);
  }
});

test('a code that is newer than the client is none', async () => {
  const told = { success: false, error: { code: 'SOMETHING_NEW', message: 'New', status: 418 } };
  const error = await AtlusError.of(Response.json(told, { status: 418 }));
  assert.deepEqual([error.code, error.status, error.message], [undefined, 418, 'New']);
});
