"use strict";
// Swagger UI at /docs, used as people use it: expand, fill in, Execute, read.

const assert = require("node:assert/strict");
const { after, before, test } = require("node:test");
const { closePage, complaining, launch, openPage, screenshot } = require("./browser.js");

const { ATLUS_URL: open, ATLUS_KEY_URL: locked, ATLUS_TEST_KEY: key } = process.env;

let browser;
before(async () => { browser = await launch(); });
after(() => browser.close());

/** The page once it shows its operations. */
async function openDocs(server, fragment = "") {
  const page = await openPage(browser, server);
  await page.goto(`${server}/docs${fragment}`);
  await page.locator(".opblock").first().waitFor();
  return page;
}

/** Every operation of the document, in its order. */
async function operations() {
  const document = await (await fetch(`${open}/openapi.json`)).json();
  return Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({ path, method, ...operation })));
}

const block = (page, operationId) => page.locator(`.opblock[id$="-${operationId}"]`);

/** Expands an operation, and presses "Try it out" where it is not pressed from the start. */
async function expand(page, operationId) {
  const operation = block(page, operationId);
  // A reload opens what was open.
  const opened = await operation.locator(".opblock-body").isVisible();
  if (!opened) await operation.locator(".opblock-summary-control").click();
  await operation.locator(".try-out").waitFor();
  const tryOut = operation.getByRole("button", { name: "Try it out" });
  if (await tryOut.isVisible()) await tryOut.click();
  return operation;
}

const setParameter = (operation, name, value) =>
  operation.locator(`tr[data-param-name="${name}"] input`).fill(value);

const setBody = (operation, body) => operation.locator(".body-param__text").fill(JSON.stringify(body, null, 2));

/** Presses Execute; what the page then shows of the answer: its status and its body. */
async function execute(operation) {
  const [response] = await Promise.all([
    operation.page().waitForResponse((response) => response.request().resourceType() === "fetch"),
    operation.getByRole("button", { name: "Execute" }).click(),
  ]);
  // Only its own answer shows this id, not that of the press before.
  const shown = operation.locator(".live-responses-table");
  await shown.filter({ hasText: response.headers()["x-request-id"] }).waitFor();
  const status = await shown.locator(".response .response-col_status").first().innerText();
  return { status: Number.parseInt(status, 10), text: await shown.locator(".highlight-code pre").first().innerText() };
}

const failedToLoad = (status) => `Failed to load resource: the server responded with a status of ${status}`;

async function authorize(page, scheme, secret) {
  await page.locator(".auth-wrapper .authorize").click();
  const part = page.locator(".auth-container", { hasText: scheme });
  await part.locator("input").fill(secret);
  await part.getByRole("button", { name: "Apply credentials" }).click();
  await part.getByRole("button", { name: "Remove authorization" }).waitFor();
  await page.locator(".close-modal").click();
}

/** Where an operation is on the page, from its head to the end of the first `selector` in it. */
async function partDownTo(operation, selector) {
  await operation.page().evaluate(() => scrollTo(0, 0));
  const head = await operation.boundingBox();
  const end = await operation.locator(selector).first().boundingBox();
  const margin = 20;
  return { x: 0, y: head.y - margin, width: 1280, height: end.y + end.height - head.y + 2 * margin };
}

test("the page shows every operation of the document, and needs no network for it", async () => {
  const page = await openDocs(open);
  assert.equal(await page.title(), "ATLUS API");
  assert.equal(await page.locator(".opblock").count(), (await operations()).length);
  await screenshot(page, "page", { fullPage: true });
  await closePage(page);
});

test("every operation expands without an error", async () => {
  const page = await openDocs(open);
  for (const { operationId } of await operations()) {
    const operation = await expand(page, operationId);
    await operation.locator(".responses-table .response").first().waitFor();
    await operation.locator(".loading").waitFor({ state: "detached" });
    await operation.locator(".opblock-summary-control").click();
  }
  assert.deepEqual(await page.locator(".errors-wrapper, .renderedMarkdown .error").allInnerTexts(), []);
  await closePage(page);
});

test("every schema expands without an error, under its name in the document", async () => {
  const document = await (await fetch(`${open}/openapi.json`)).json();
  const page = await openDocs(open);
  const names = page.locator(".models .model-container .model-title");
  if (!await names.count()) await page.locator(".models-control").click();
  await names.first().waitFor();
  assert.deepEqual((await names.allInnerTexts()).sort(), Object.keys(document.components.schemas).sort());
  for (const control of await page.locator(".models .model-container .model-box-control").all()) await control.click();
  await screenshot(page.locator(".models"), "schemas");
  assert.deepEqual(await page.locator(".errors-wrapper").allInnerTexts(), []);
  await closePage(page);
});

test("a session is created and its conversation held", async () => {
  const page = await openDocs(open);
  const create = await expand(page, "createSession");
  const created = await execute(create);
  assert.equal(created.status, 201);
  const session = /session_[0-9a-f]{16}/.exec(created.text)?.[0];
  assert.ok(session, `no session id on the page: ${created.text}`);
  await screenshot(create, "session-created");

  const chat = await expand(page, "chat");
  await setBody(chat, { session_id: session, message: "Hi, my name is John" });
  assert.equal((await execute(chat)).status, 200);
  await setBody(chat, { session_id: session, message: "What's my name?" });
  const answer = await execute(chat);
  assert.equal(answer.status, 200);
  assert.match(answer.text, /Your name is John/);
  await screenshot(chat, "chat-answered");
  await screenshot(page, "conversation", { fullPage: true, clip: await partDownTo(chat, ".live-responses-table pre") });
  await closePage(page);
});

test("an answer can be heard while it comes", async () => {
  const page = await openDocs(open);
  const stream = await expand(page, "chatStream");
  await setBody(stream, { message: "My name is John" });
  const heard = await execute(stream);
  assert.equal(heard.status, 200);
  assert.match(heard.text, /event: ?start[^]*event: ?delta[^]*event: ?done[^]*Nice to meet you, John/);
  await screenshot(stream, "chat-streamed");
  await closePage(page);
});

// People press Execute first and read later. What the page fills in must not stand in their way: no cursor, no ETag and
// no Idempotency-Key that nobody gave them.
test("every request that names nothing can be executed as the page fills it in, twice", async () => {
  const page = await openDocs(open);
  const failures = [];
  for (const { operationId, method, path, parameters = [] } of await operations()) {
    // An archive, and what is required, are for people to fill in.
    if (parameters.some(({ required }) => required) || operationId === "importArchive") continue;
    const operation = await expand(page, operationId);
    for (const time of ["first", "second"]) {
      const { status, text } = await execute(operation);
      if (status >= 400) failures.push(`${method} ${path}, the ${time} time: ${text}`);
      else if (/replayed: true/.test(await operation.innerText())) failures.push(`${method} ${path}: replayed`);
    }
    await operation.locator(".opblock-summary-control").click();
  }
  assert.deepEqual(failures, []);
  await closePage(page);
});

test("wrong input shows the failure and what is wrong with it", async () => {
  const page = await openDocs(open);
  const chat = await expand(page, "chat");
  await setBody(chat, { message: 5 });
  const refused = await complaining(page, failedToLoad(400), () => execute(chat));
  assert.equal(refused.status, 400);
  const { success, error } = JSON.parse(refused.text);
  assert.equal(success, false);
  assert.equal(error.code, "VALIDATION_ERROR");
  assert.equal(error.details[0].field, "message");
  await screenshot(chat, "chat-refused");
  await closePage(page, [`${failedToLoad(400)} (Bad Request)`]);
});

for (const scheme of ["BearerKey", "ApiKeyHeader"]) {
  test(`Authorize with a key as ${scheme} opens a server that asks for one, also after a reload`, async () => {
    const page = await openDocs(locked);
    let list = await expand(page, "listSessions");
    const refused = await complaining(page, failedToLoad(401), () => execute(list));
    assert.equal(refused.status, 401);
    assert.match(refused.text, /"UNAUTHORIZED"/);

    await authorize(page, scheme, key);
    assert.equal((await execute(list)).status, 200);
    await page.reload();
    list = await expand(page, "listSessions");
    assert.equal((await execute(list)).status, 200);
    await screenshot(page, `authorized-${scheme}`);
    await closePage(page, [`${failedToLoad(401)} (Unauthorized)`]);
  });
}

test("a link to an operation opens it", async () => {
  const page = await openDocs(open, "#/Chat/chat");
  await block(page, "chat").getByRole("button", { name: "Execute" }).waitFor();
  await closePage(page);
});

// The tests above pass if nobody watches, too.
test("what goes wrong on a page is noticed", async () => {
  const page = await openDocs(open);
  await complaining(page, "Content Security Policy", () =>
    page.evaluate(() => fetch("https://elsewhere.invalid/").catch(() => null)));
  await complaining(page, "careful", () => page.evaluate(() => console.warn("careful")));
  await Promise.all([
    page.waitForEvent("pageerror"),
    page.evaluate(() => { setTimeout(() => { throw new Error("thrown"); }); }),
  ]);
  assert.deepEqual(page.troubles.slice(-2), ["careful", "error: thrown"]);
  assert.match(page.troubles.join("\n"), /https:\/\/elsewhere\.invalid\/.*Content Security Policy/s);
  // A page without a policy gets as far as a request.
  await page.goto("about:blank");
  await page.evaluate(() => fetch("https://elsewhere.invalid/").catch(() => null));
  assert.ok(page.troubles.includes("request to https://elsewhere.invalid/"));
  await page.context().close();
});
