// The OpenAPI document as a page to read: every operation with its parameters, its body and its answers.
const element = (tag, text, properties = {}) =>
  Object.assign(document.createElement(tag), { textContent: text, ...properties });

function table(columns, rows) {
  const drawn = element("table", "");
  const head = element("tr", "");
  head.append(...columns.map((column) => element("th", column, { scope: "col" })));
  drawn.append(head, ...rows.map((row) => {
    const line = element("tr", "");
    line.append(...row.map((cell) => element("td", cell)));
    return line;
  }));
  const frame = element("div", "", { className: "wide", tabIndex: 0 });
  frame.append(drawn);
  return frame;
}

const PROBLEM = "application/problem+json";
const nameOf = (reference) => reference.split("/").at(-1);

// What a value may be, in words: its type and its limits.
function described(schema) {
  if (!schema || Object.keys(schema).length === 0) return "anything";
  if (schema.$ref) return nameOf(schema.$ref);
  if (schema.anyOf) return [...new Set(schema.anyOf.map(described))].join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  const limits = [
    ["minimum", "at least"], ["exclusiveMinimum", "above"], ["maximum", "at most"], ["exclusiveMaximum", "below"],
    ["minLength", "length at least"], ["maxLength", "length at most"], ["maxItems", "items at most"],
  ].filter(([key]) => key in schema).map(([key, words]) => `${words} ${schema[key]}`);
  const kind = schema.type === "array" ? `list of ${described(schema.items)}` : schema.type ?? "object";
  return [kind, ...limits].join(", ");
}

function fields(schema) {
  const wanted = new Set(schema.required ?? []);
  return Object.entries(schema.properties ?? {}).map(([name, field]) => [
    name, described(field), wanted.has(name) ? "required" : JSON.stringify(field.default ?? null), field.description ?? "",
  ]);
}

function operation(path, method, what) {
  const section = element("section", "");
  section.append(element("h2", `${method.toUpperCase()} ${path}`), element("p", what.description ?? what.summary ?? ""));
  if (what.parameters?.length) {
    section.append(table(["parameter", "value", "default", ""], what.parameters.map((parameter) => [
      parameter.name, described(parameter.schema),
      parameter.required ? "required" : JSON.stringify(parameter.schema.default ?? null),
      parameter.description ?? parameter.schema.description ?? "",
    ])));
  }
  const body = what.requestBody?.content["application/json"]?.schema;
  if (body) section.append(element("p", `Body: ${described(body)}`));
  for (const [status, answer] of Object.entries(what.responses)) {
    if (PROBLEM in (answer.content ?? {})) continue;
    const kinds = Object.entries(answer.content ?? {}).map(([kind, { schema }]) =>
      `${kind}${schema?.$ref || schema?.items ? `: ${described(schema)}` : ""}`);
    section.append(element("p", `Answer ${status}: ${kinds.join("; ")}`));
  }
  const problems = Object.entries(what.responses).filter(([, answer]) => PROBLEM in (answer.content ?? {}));
  const list = element("details", "");
  list.append(element("summary", `Problems: ${problems.map(([status]) => status).join(", ")}`));
  list.append(table(["status", ""], problems.map(([status, answer]) => [status, answer.description])));
  section.append(list);
  return section;
}

try {
  const response = await fetch("/openapi.json");
  if (!response.ok) throw new Error(`the OpenAPI document is not there (status ${response.status})`);
  const openapi = await response.json();
  const operations = Object.entries(openapi.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, what]) => operation(path, method, what)));
  const models = Object.entries(openapi.components.schemas).filter(([, schema]) => schema.properties).map(([name, schema]) => {
    const section = element("section", "");
    section.append(element("h2", name), table(["field", "value", "default", ""], fields(schema)));
    return section;
  });
  document.getElementById("operations").replaceChildren(...operations, ...models);
} catch (error) {
  document.getElementById("problem").textContent = error.message;
  document.getElementById("problem").hidden = false;
}
