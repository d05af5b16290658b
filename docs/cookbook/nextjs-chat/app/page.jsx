"use client";

import { EventSourceParserStream } from "eventsource-parser/stream";
import { useState } from "react";

/** The events of a stream as they come. */
async function* eventsOf(response) {
  const texts = response.body.pipeThrough(new TextDecoderStream());
  const reader = texts.pipeThrough(new EventSourceParserStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield { type: value.event, data: JSON.parse(value.data) };
  }
}

export default function Chat() {
  const [turns, setTurns] = useState([]);
  const [failure, setFailure] = useState(null);
  const [busy, setBusy] = useState(false);

  /** The answer as far as it is there, piece by piece. */
  async function* answerTo(message) {
    const response = await fetch("/chat", { method: "POST", body: JSON.stringify({ message }) });
    if (!response.ok) {
      const failure = await response.json().catch(() => null);
      throw new Error(failure?.error?.message ?? "The server does not answer.");
    }
    for await (const { type, data } of eventsOf(response)) {
      if (type === "delta") yield data.text;
      if (type === "error") throw new Error(data.error.message);
      if (type === "done") return;
    }
    throw new Error("The connection broke.");
  }

  async function send(event) {
    event.preventDefault();
    const form = event.currentTarget;
    const message = new FormData(form).get("message");
    form.reset();
    setFailure(null);
    setBusy(true);
    const before = turns;
    let response = "";
    setTurns([...before, { message, response }]);
    try {
      for await (const piece of answerTo(message)) {
        response += piece;
        setTurns([...before, { message, response }]);
      }
    } catch (error) {
      setFailure(error.message);
    }
    setBusy(false);
  }

  return (
    <main>
      {turns.map(({ message, response }, index) => (
        <section key={index}>
          <p><strong>{message}</strong></p>
          <p aria-live="polite">{response}</p>
        </section>
      ))}
      {failure && <p role="alert">{failure}</p>}
      <form onSubmit={send}>
        <input name="message" aria-label="Message" required autoFocus autoComplete="off" style={{ width: "80%" }} />{" "}
        <button disabled={busy}>Send</button>
      </form>
    </main>
  );
}
