/** What the generated code does not do: keys, failures as typed errors, pages to the end, and streams. */
import { type Client, createClient, createConfig } from './generated/client/index.js';
import {
  type ChatAnswer,
  type ChatRequest,
  chatStream,
  type DeltaEvent,
  type ErrorDetail,
  type Failure,
  type StartEvent,
  streamTurn,
} from './generated/index.js';
import { ErrorCode } from './generated/types.gen.js';

export type { Client };

/** How long a stream may say nothing: it shows a sign of life every 15 seconds, but may wait for its session for 60. */
const SILENCE = 90_000;

/** A failure that the server told. */
export class AtlusError extends Error {
  override readonly name = 'AtlusError';
  /** What to branch on; absent if the answer came from something between, or a server newer than this client. */
  readonly code: ErrorCode | undefined;
  readonly status: number;
  readonly details: ErrorDetail[];
  readonly request_id: string | undefined;
  /** Seconds after which trying again may help. */
  readonly retry_after: number | undefined;

  constructor(told: unknown, status: number, headers = new Headers()) {
    const failure = isFailure(told) ? told : undefined;
    super(failure?.error.message ?? `The answer has the status ${status}`);
    this.code = Object.values(ErrorCode).find((code) => code === failure?.error.code);
    this.status = failure?.error.status ?? status;
    this.details = failure?.error.details ?? [];
    this.request_id = failure?.request_id ?? headers.get('X-Request-ID') ?? undefined;
    const wait = headers.get('Retry-After') ?? '';
    this.retry_after = /^\d+$/.test(wait) ? Number(wait) : undefined;
  }

  /** What an answer tells. */
  static async of(response: Response): Promise<AtlusError> {
    const told: unknown = await response.json().catch(() => undefined);
    return new AtlusError(told, response.status, response.headers);
  }
}

const isFailure = (told: unknown): told is Failure => (told as Partial<Failure> | undefined)?.success === false;

/** `fetch`, but that every failure is thrown. */
const checked: typeof fetch = async (input, init) => {
  const response = await fetch(input, init);
  // An unhealthy server describes its health, as a healthy one does.
  if (response.ok || new URL(response.url).pathname.endsWith('/api/v1/health')) return response;
  throw await AtlusError.of(response);
};

/**
 * Speaks to a server, and shows it a key.
 *
 * Without arguments they are taken from `ATLUS_SERVER` and `ATLUS_API_KEY`, as `atlus chat` does; the server is
 * http://127.0.0.1:5000 if nothing names another.
 */
export function connect(server?: string, key?: string): Client {
  const { process } = globalThis as { process?: { env?: Record<string, string | undefined> } };
  const token = key || process?.env?.['ATLUS_API_KEY'];
  return createClient(
    createConfig({
      baseUrl: (server || process?.env?.['ATLUS_SERVER'] || 'http://127.0.0.1:5000').replace(/\/+$/, ''),
      fetch: checked,
      headers: token ? { Authorization: `Bearer ${token}` } : {},
      throwOnError: true,
    }),
  );
}

type Page<Item> = { data: { data: { items: Item[]; next_cursor: string | null } } };

/** Every item of a listing, page by page: `pages((cursor) => listSessions({ client, query: { cursor } }))`. */
export async function* pages<Item>(
  listing: (cursor: string | undefined) => Promise<Page<Item>>,
): AsyncGenerator<Item, void> {
  let cursor: string | undefined;
  do {
    const { items, next_cursor } = (await listing(cursor)).data.data;
    yield* items;
    cursor = next_cursor ?? undefined;
  } while (cursor);
}

/** A piece of news of a turn. `id` is the offset in the reply that follows it, in bytes; `text` what it adds to it. */
export type TurnEvent =
  | { event: 'start'; id: number; data: StartEvent; text: '' }
  | { event: 'delta'; id: number; data: DeltaEvent; text: string }
  | { event: 'done'; id: number; data: ChatAnswer; text: '' };

export type Listening = {
  client: Client;
  signal?: AbortSignal;
  /** How often in a row a connection that breaks is resumed before it is given up; 5 if absent. */
  resumes?: number;
};

type Place = { session_id: string; turn: number; last: number | undefined };
type Heard = { data: unknown; event?: string; id?: string };
type Opening = {
  onSseError: (error: unknown) => void;
  onSseEvent: (heard: Heard) => void;
  /** The generated code would ask again for ever, and send the message again. */
  sseMaxRetryAttempts: 1;
  signal: AbortSignal;
};
type Open = (opening: Opening) => Promise<{ stream: AsyncGenerator<unknown> }>;

/**
 * Sends a message and tells its answer while it comes: `start`, `delta`s, `done`. It is sent when the first event is
 * asked for.
 *
 * A connection that breaks is resumed, without a piece of text missing or coming twice. A turn that fails throws an
 * `AtlusError`.
 */
export function stream(
  asked: Listening & { body: ChatRequest; headers?: { 'Idempotency-Key'?: string } },
): AsyncGenerator<TurnEvent, void> {
  const { client, body, headers = {} } = asked;
  return listen(asked, (opening) => chatStream({ client, body, headers, ...opening }));
}

/** Hears a turn's answer from the event after `Last-Event-ID` on, or from the beginning. */
export function resume(
  asked: Listening & { path: { session_id: string; turn: number }; headers?: { 'Last-Event-ID'?: number } },
): AsyncGenerator<TurnEvent, void> {
  const place = { ...asked.path, last: asked.headers?.['Last-Event-ID'] };
  return listen(asked, (opening) => goOn(asked.client, place, opening), place);
}

const goOn = (client: Client, { session_id, turn, last }: Place, opening: Opening) =>
  streamTurn({
    client,
    path: { session_id, turn },
    headers: last === undefined ? {} : { 'Last-Event-ID': last },
    ...opening,
  });

async function* listen(
  { client, signal, resumes = 5 }: Listening,
  open: Open,
  place?: Place,
): AsyncGenerator<TurnEvent, void> {
  let broke = 0;
  for (;;) {
    try {
      for await (const event of connection(open, signal)) {
        broke = 0;
        if (event.event === 'start') place = { ...event.data, last: event.id };
        if (place) place.last = event.id;
        yield event;
        if (event.event === 'done') return;
      }
      throw new TypeError('the stream ended before its turn did');
    } catch (error) {
      broke += 1;
      // Before `start` nobody knows whether the message arrived: whoever gave an Idempotency-Key sends it again.
      if (error instanceof AtlusError || signal?.aborted || !place || broke > resumes) throw error;
      const from = place;
      open = (opening) => goOn(client, from, opening);
      if (broke > 1) await new Promise((resolve) => setTimeout(resolve, 250 * 2 ** broke));
    }
  }
}

/** The events of one connection; throws what broke it. */
async function* connection(open: Open, signal?: AbortSignal): AsyncGenerator<TurnEvent, void> {
  const ended = new AbortController();
  let heard: Heard | undefined;
  let broke: unknown;
  let silence: ReturnType<typeof setTimeout> | undefined;
  const listenOn = () => {
    clearTimeout(silence);
    silence = setTimeout(() => ended.abort(), SILENCE);
  };
  listenOn();
  try {
    const { stream } = await open({
      onSseError: (error) => (broke = error),
      onSseEvent: (event) => {
        listenOn();
        heard = event;
      },
      sseMaxRetryAttempts: 1,
      signal: signal ? AbortSignal.any([signal, ended.signal]) : ended.signal,
    });
    for await (const data of stream) {
      const event = read(heard, data);
      if (event) yield event;
    }
  } finally {
    clearTimeout(silence);
    ended.abort();
  }
  signal?.throwIfAborted();
  if (broke) throw broke;
}

/** What an event says; nothing for one of a kind that this client does not know. */
function read(heard: Heard | undefined, data: unknown): TurnEvent | undefined {
  const id = Number(heard?.id);
  switch (heard?.event) {
    case 'start':
      return { event: 'start', id, data: data as StartEvent, text: '' };
    case 'delta':
      return { event: 'delta', id, data: data as DeltaEvent, text: (data as DeltaEvent).text };
    case 'done':
      return { event: 'done', id, data: data as ChatAnswer, text: '' };
    case 'error':
      throw new AtlusError(data, (data as Failure).error.status);
    default:
      return undefined;
  }
}
