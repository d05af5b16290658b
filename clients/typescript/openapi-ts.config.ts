import { defineConfig } from '@hey-api/openapi-ts';

// How the document is read, and what is made of it.
export default defineConfig({
  input: '../../openapi.yaml',
  output: { path: 'src/generated', module: { extension: '.js' } },
  logs: { file: false, level: 'warn' },
  plugins: [
    { name: '@hey-api/client-fetch', throwOnError: true },
    { name: '@hey-api/typescript', enums: 'javascript' },
    '@hey-api/sdk',
  ],
  parser: {
    patch: {
      operations: (_method, _path, operation) => {
        // The connection shows its own key.
        delete operation.security;
        // An archive is bytes.
        const body = 'requestBody' in operation && operation.requestBody;
        const parts = [body, ...Object.values(operation.responses ?? {})];
        for (const part of parts) {
          const archive = part && 'content' in part && part.content?.['application/x-ndjson'];
          if (archive) archive.schema = { type: 'string', format: 'binary' };
        }
      },
    },
  },
});
