"use strict";
// docs/cookbook/nextjs-chat as it was built: Chromium talks to the page, and the page to ATLUS.

const assert = require("node:assert/strict");
const { spawn } = require("node:child_process");
const { once } = require("node:events");
const { createServer } = require("node:http");
const { createInterface } = require("node:readline");
const { after, before, test } = require("node:test");
const { closePage, complaining, launch, openPage, screenshot } = require("../browser/browser.js");

const { NEXTJS_APP: app, ATLUS_API_KEY: key } = process.env;

let browser, origin;
const processes = [];

/** Starts a server, and tells the address that it prints. */
async function start(command, args, options) {
  // All it says goes to one pipe: ATLUS writes its log to standard error.
  const stdio = ["ignore", "pipe", "inherit"];
  const server = spawn("sh", ["-c", 'exec "$0" "$@" 2>&1', command, ...args], { stdio, ...options });
  processes.push(server);
  const said = [];
  for await (const line of createInterface(server.stdout)) {
    said.push(line);
    const address = /http:\/\/127\.0\.0\.1:\d+/.exec(line)?.[0];
    if (!address) continue;
    server.stdout.resume();
    return address;
  }
  throw new Error(`${command} does not start: ${said.join("\n")}`);
}

const startPage = (environment) =>
  start(process.execPath, ["node_modules/next/dist/bin/next", "start", "--port", "0", "--hostname", "127.0.0.1"], {
    cwd: app,
    env: { ...process.env, ...environment },
  });

before(async () => {
  browser = await launch();
  origin = await startPage();
});

after(async () => {
  await browser.close();
  for (const server of processes.filter(({ exitCode }) => exitCode === null)) {
    server.kill();
    await once(server, "exit");
  }
});

async function openChat(address = origin) {
  const page = await openPage(browser, address);
  await page.goto(address);
  return page;
}

/** Sends a message as a person does. */
async function say(page, message) {
  await page.getByLabel("Message").fill(message);
  await page.getByRole("button", { name: "Send" }).click();
}

test("a conversation is held, and goes on after a reload", async () => {
  const page = await openChat();
  await say(page, "Hi, my name is John");
  await page.getByText("Nice to meet you, John").waitFor();
  await say(page, "What's my name?");
  await page.getByText("Your name is John.").waitFor();
  await screenshot(page, "nextjs-chat");
  await page.reload();
  await say(page, "What did I just say?");
  await page.getByText("You just said: \"What's my name?\"").waitFor();
  await closePage(page);
});

test("visitors know nothing of each other", async () => {
  const [john, jo] = [await openChat(), await openChat()];
  await say(john, "Hi, my name is John");
  await john.getByText("Nice to meet you, John").waitFor();
  await say(jo, "What's my name?");
  await jo.getByText("You have not told me your name yet.").waitFor();
  await closePage(john);
  await closePage(jo);
});

test("the answer is shown while it comes", async () => {
  // A model that says the rest only when it is told to.
  let goOn;
  const told = new Promise((resolve) => { goOn = resolve; });
  const model = createServer(async (request, response) => {
    const piece = (content) => response.write(`data: ${JSON.stringify({ choices: [{ delta: { content } }] })}\n\n`);
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    piece("Once upon a time");
    await told;
    piece(" there was an end.");
    response.end("data: [DONE]\n\n");
  });
  await once(model.listen(0, "127.0.0.1"), "listening");
  const atlus = await start(process.env.ATLUS_BIN, ["serve"], {
    env: {
      ATLUS_LISTEN: "127.0.0.1:0",
      ATLUS_LOG_FORMAT: "text",
      ATLUS_DATABASE_URL: `sqlite://${process.env.NEXTJS_DATABASE}`,
      ATLUS_MODEL_URL: `http://127.0.0.1:${model.address().port}/v1`,
      ATLUS_MODEL: "slow",
    },
  });
  const page = await openChat(await startPage({ ATLUS_SERVER: atlus }));
  await say(page, "Tell me a story");
  await page.getByText("Once upon a time", { exact: true }).waitFor();
  goOn();
  await page.getByText("Once upon a time there was an end.", { exact: true }).waitFor();
  await closePage(page);
  model.close();
});

test("the key stays on the server", async () => {
  const page = await openPage(browser, origin);
  const loaded = [];
  page.on("response", (response) => loaded.push(response));
  await page.goto(origin, { waitUntil: "networkidle" });
  const texts = await Promise.all(loaded.map((response) => response.text()));
  assert.ok(texts.length > 2, "a page and its scripts");
  // The browser does not keep what a page reads as a stream, so this asks for one itself.
  const answer = await page.request.post(`${origin}/chat`, { data: { message: "Hello" } });
  assert.equal(answer.headers()["content-type"], "text/event-stream");
  for (const text of [...texts, await answer.text(), JSON.stringify(answer.headers())]) assert.ok(!text.includes(key));
  await closePage(page);
});

test("a refusal is shown in its own words", async () => {
  const page = await openChat();
  await complaining(page, "status of 400", () => say(page, "x".repeat(40_000)));
  await page.getByRole("alert").filter({ hasText: "32000" }).waitFor();
  await closePage(page, ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]);
});
