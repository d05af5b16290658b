import { randomUUID } from "node:crypto";
import { cookies } from "next/headers";

const server = process.env.ATLUS_SERVER ?? "http://127.0.0.1:5000";

/** Calls ATLUS with the key, which never leaves this server. */
function atlus(path, body) {
  return fetch(`${server}/api/v1${path}`, {
    method: body ? "POST" : "GET",
    headers: { Authorization: `Bearer ${process.env.ATLUS_API_KEY}`, "Content-Type": "application/json" },
    body: body && JSON.stringify(body),
    cache: "no-store",
  });
}

/** Who talks. Ask your sign-in here; this one only tells browsers apart. */
async function visitor() {
  const jar = await cookies();
  const id = jar.get("visitor")?.value ?? randomUUID();
  jar.set("visitor", id, { httpOnly: true, sameSite: "strict", maxAge: 90 * 24 * 60 * 60 });
  return id;
}

function passOn(answer) {
  const headers = { "Content-Type": answer.headers.get("Content-Type"), "Cache-Control": "no-store, no-transform" };
  return new Response(answer.body, { status: answer.status, headers });
}

/** Takes a message and passes the answer on while it comes, as server-sent events. */
export async function POST(request) {
  const { message } = await request.json();
  const user_id = await visitor();
  const known = await atlus(`/sessions/continue?user_id=${encodeURIComponent(user_id)}`);
  const session = known.status === 404 ? await atlus("/sessions", { user_id }) : known;
  if (!session.ok) return passOn(session);
  const { session_id } = (await session.json()).data;
  return passOn(await atlus("/chat/stream", { session_id, message }));
}
