// Swagger UI on the server's own document, with a curl command for each operation.

import { isDark } from "./theme.js";

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function example(operation, document) {
  const schema = operation.requestBody?.content["application/json"].schema;
  const name = schema?.$ref?.split("/").at(-1);
  return (document.components.schemas[name] ?? schema)?.examples?.[0];
}

function curl(method, path, operation, body) {
  const url = new URL(`.${path}`, location.href).href;
  const verb = method === "get" ? "" : ` -X ${method.toUpperCase()}`;
  const data = body ? ` -H 'Content-Type: application/json' \\\n  -d ${quote(JSON.stringify(body))}` : "";
  const key = operation.security ? " -H 'Authorization: Bearer KEY'" : "";
  return `curl${verb} ${quote(decodeURI(url))}${key}${data}`;
}

const api = await (await fetch("openapi.json")).json();
for (const [path, operations] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(operations)) {
    const command = curl(method, path, operation, example(operation, api));
    operation.tags = [method === "get" ? "Server" : "Text"];
    operation.description = `${operation.description ?? ""}\n\n\`\`\`sh\n${command}\n\`\`\``;
  }
}
api.tags = [{ name: "Text" }, { name: "Server" }];

document.documentElement.classList.toggle("dark-mode", isDark());
window.SwaggerUIBundle({
  spec: api,
  dom_id: "#api",
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  defaultModelRendering: "example",
  tryItOutEnabled: true,
  validatorUrl: null,
});
