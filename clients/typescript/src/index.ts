/** Talk to ATLUS: `helper` is written by hand, everything else comes from the server's OpenAPI document. */
export * from './generated/index.js';
export { ErrorCode, OnBusy } from './generated/types.gen.js';
export * from './helper.js';
