/** Conversations, pages, replays and archives. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { test } from 'node:test';
import { promisify } from 'node:util';
import {
  appendTurns,
  chat,
  createSession,
  deleteSession,
  ErrorCode,
  exportSession,
  getHealth,
  getSession,
  importArchive,
  listSessions,
  listTurns,
  pages,
  updateSession,
} from '@atlus/client';
import { all, both, newSession, nobody, to, world } from './world.js';

for (const server of both) {
  const client = to(server);

  const say = async (session_id: string, message: string) =>
    (await chat({ client, body: { session_id, message } })).data.data;

  test(`a conversation from creation to deletion (${server})`, async () => {
    const body = { user_id: `user_${randomUUID()}`, metadata: { source: 'web' } };
    const created = (await createSession({ client, body })).data.data;
    assert.deepEqual(created.metadata, { source: 'web' });
    const { session_id } = created;
    assert.match((await say(session_id, 'Hello, ATLUS!')).response, /^Hello!/);
    assert.match((await say(session_id, 'Hi, my name is John')).response, /John/);
    assert.match((await say(session_id, "What's my name?")).response, /Your name is John/);
    const recap = await say(session_id, 'What did I just say?');
    assert.match(recap.response, /What's my name\?/);
    assert.equal(recap.turn, 4);

    const { memory } = (await getSession({ client, path: { session_id } })).data.data;
    assert.deepEqual(memory, {
      session_id,
      has_session_memory: true,
      has_working_memory: true,
      has_behavior_profile: true,
      conversation_turns: 4,
    });

    const deleted = (await deleteSession({ client, path: { session_id } })).data;
    assert.equal(deleted.message, 'Session deleted successfully');
    assert.equal(deleted.session_id, session_id);
    await assert.rejects(getSession({ client, path: { session_id } }), { code: ErrorCode.SESSION_NOT_FOUND });
    await assert.rejects(say(session_id, 'Anybody there?'), { code: ErrorCode.INVALID_SESSION });
  });

  test(`pages list every session once (${server})`, async () => {
    const user_id = `user_${randomUUID()}`;
    const made = await Promise.all(Array.from({ length: 45 }, () => newSession(client, user_id)));
    const listing = pages((cursor) => listSessions({ client, query: { user_id, limit: 10, cursor } }));
    const listed = (await all(listing)).map((session) => session.session_id);
    assert.equal(listed.length, 45);
    assert.deepEqual(listed.sort(), made.sort());
  });

  test(`pages list every turn once and in order (${server})`, async () => {
    const session_id = await newSession(client);
    const turns = Array.from({ length: 45 }, (_, index) => ({ message: `message ${index + 1}`, response: 'noted' }));
    await appendTurns({ client, path: { session_id }, body: { turns } });
    const listing = pages((cursor) => listTurns({ client, path: { session_id }, query: { limit: 10, cursor } }));
    const listed = await all(listing);
    assert.deepEqual(
      listed.map(({ turn, message }) => ({ turn, message })),
      turns.map(({ message }, index) => ({ turn: index + 1, message })),
    );
  });

  test(`a request sent again is answered as before (${server})`, async () => {
    const session_id = await newSession(client);
    const ask = { client, body: { session_id, message: 'Hello' }, headers: { 'Idempotency-Key': randomUUID() } };
    const [first, second] = [await chat(ask), await chat(ask)];
    assert.equal(first.response.headers.get('Idempotency-Replayed'), null);
    assert.equal(second.response.headers.get('Idempotency-Replayed'), 'true');
    assert.deepEqual(second.data.data, first.data.data);
    const turns = await all(pages((cursor) => listTurns({ client, path: { session_id }, query: { cursor } })));
    assert.equal(turns.length, 1);
  });

  test(`an ETag guards a change (${server})`, async () => {
    const path = { session_id: await newSession(client) };
    const etag = (await getSession({ client, path })).response.headers.get('ETag') ?? '';
    const change = { client, path, body: { title: 'Names' }, headers: { 'If-Match': etag } };
    assert.equal((await updateSession(change)).data.data.title, 'Names');
    await assert.rejects(updateSession(change), { code: ErrorCode.PRECONDITION_FAILED });
  });

  test(`an archive comes back (${server})`, async () => {
    const session_id = await newSession(client);
    await say(session_id, 'Hello');
    const archive = (await exportSession({ client, path: { session_id } })).data;
    await deleteSession({ client, path: { session_id } });
    const imported = (await importArchive({ client, body: archive })).data.data;
    assert.equal(imported.sessions, 1);
    assert.equal(imported.turns, 1);
    const session = (await getSession({ client, path: { session_id } })).data.data;
    assert.equal(session.memory.conversation_turns, 1);
  });

  test(`health is described (${server})`, async () => {
    assert.equal((await getHealth({ client })).data.status, 'healthy');
  });

  test(`the README works as it stands (${server})`, async () => {
    const readme = await readFile('README.md', 'utf8');
    const [, code, more] = readme.split(/^```ts\n(.*?)^```/ms);
    assert.ok(code && !more?.includes('```ts'));
    const env = {
      ...process.env,
      ATLUS_SERVER: world.servers[server],
      ATLUS_API_KEY: server === 'keyed' ? world.key : '',
    };
    // It is plain JavaScript, too.
    const options = { env, cwd: import.meta.dirname };
    const { stdout } = await promisify(execFile)('node', ['--input-type=module', '--eval', code], options);
    assert.match(stdout, /Nice to meet you, John/);
    assert.match(stdout, /Your name is John/);
    assert.match(stdout, /session_[0-9a-f]{16}/);
  });
}

test('a caller who wants no exception gets the error', async () => {
  const client = to('open');
  const { error } = await getSession({ client, path: { session_id: nobody }, throwOnError: false });
  assert.equal((error as { code?: string }).code, ErrorCode.SESSION_NOT_FOUND);
});
