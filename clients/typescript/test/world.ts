/** The servers that `clients/tests/world.py` has started. */
import { type Client, connect, createSession } from '@atlus/client';

export type World = {
  servers: Record<string, string>;
  key: string;
  read_key: string;
  slow_text: string;
};

export const world: World = JSON.parse(process.env.ATLUS_TEST_WORLD ?? '{}');

export const to = (server: string): Client =>
  connect(world.servers[server], server === 'keyed' ? world.key : undefined);

/** A server without keys, then one that asks for them. */
export const both = ['open', 'keyed'];

export const nobody = 'session_0000000000000000';

export async function newSession(client: Client, user_id = 'user_123'): Promise<string> {
  return (await createSession({ client, body: { user_id } })).data.data.session_id;
}

export async function all<Item>(items: AsyncIterable<Item>): Promise<Item[]> {
  const found: Item[] = [];
  for await (const item of items) found.push(item);
  return found;
}
