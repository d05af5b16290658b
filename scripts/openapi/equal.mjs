// equal.mjs YAML JSON: whether two files say the same, for readers of YAML 1.2 and of 1.1, which takes more for times,
// numbers and booleans.
import { readFileSync } from "node:fs";
import { isDeepStrictEqual } from "node:util";
import { parse } from "yaml";

const [yaml, json] = process.argv.slice(2).map((file) => readFileSync(file, "utf8"));
for (const version of ["1.2", "1.1"]) {
  if (!isDeepStrictEqual(parse(yaml, { version }), JSON.parse(json))) {
    console.error(`as YAML ${version} the document says something else than as JSON`);
    process.exitCode = 1;
  }
}
