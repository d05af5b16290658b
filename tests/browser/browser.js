"use strict";
// Chromium as the tests use it: with an empty profile, cut off from the network, and watched.

const assert = require("node:assert/strict");
const path = require("node:path");
const { chromium } = require("playwright-core");

const screenshots = process.env.BROWSER_SCREENSHOTS;

function launch() {
  return chromium.launch({
    executablePath: process.env.BROWSER_CHROMIUM,
    args: [
      "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync",
      // Also what no page asked for finds no host.
      "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ],
  });
}

/**
 * A page in a profile of its own that reaches `origin` and nothing else. `page.troubles` lists what it tried to fetch
 * from elsewhere, what it threw, and what the console had to complain about, violations of the page's policy among it.
 */
async function openPage(browser, origin) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 } });
  const page = await context.newPage();
  page.troubles = [];
  await context.route((url) => url.origin !== origin, (route) => {
    page.troubles.push(`request to ${route.request().url()}`);
    return route.abort();
  });
  page.on("pageerror", (error) => page.troubles.push(`error: ${error.message}`));
  page.on("console", (message) => {
    if (["error", "warning", "assert"].includes(message.type())) page.troubles.push(message.text());
  });
  return page;
}

/** Closes a page on which nothing went wrong but what the test has provoked. */
async function closePage(page, provoked = []) {
  // What the page said before is heard before its answer.
  await page.evaluate(() => null);
  await page.context().close();
  assert.deepEqual(page.troubles, provoked);
}

/** Does what makes the browser complain in its console, and returns once it has. */
async function complaining(page, text, act) {
  const [, outcome] = await Promise.all([
    page.waitForEvent("console", (message) => message.text().includes(text)),
    act(),
  ]);
  return outcome;
}

/** Keeps a picture of a page or of a part of it, for people to look at. */
function screenshot(what, name, options = {}) {
  return what.screenshot({ path: path.join(screenshots, `${name}.png`), ...options });
}

module.exports = { launch, openPage, closePage, complaining, screenshot };
