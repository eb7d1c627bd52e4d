// The page of the service: a history, a mode, and what comes of it. No library; every text goes in as text, never as HTML.
const at = (id) => document.getElementById(id);
const state = { user: null, history: [], items: [], chosen: 0, found: [], marked: -1, stop: null };
const MARKERS = ["Evidence:", "Preference:", "Intent:", "Recommendation:"];

const element = (tag, text, properties = {}) =>
  Object.assign(document.createElement(tag), { textContent: text, ...properties });
const headers = () => {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

async function ask(path, options = {}) {
  const response = await fetch(path, { headers: headers(), ...options });
  if (response.ok) return response;
  let problem = { title: response.statusText, detail: "" };
  try { problem = await response.json(); } catch { /* no problem details: the status has to do */ }
  throw new Error(problem.detail || problem.title || `status ${response.status}`);
}

function showProblem(message) {
  at("problem").textContent = message;
  at("problem").hidden = !message;
}

function waited(action) {
  let timer;
  return (...values) => { clearTimeout(timer); timer = setTimeout(() => action(...values), 150); };
}

// ---- the history

function showHistory() {
  const list = at("history");
  list.replaceChildren(...state.history.map((item, place) => {
    const line = element("li", `${item.title} `);
    const remove = element("button", "×", { type: "button", title: "Remove" });
    remove.setAttribute("aria-label", `Remove ${item.title}`);
    remove.addEventListener("click", () => { state.history.splice(place, 1); state.user = null; showHistory(); });
    line.append(remove);
    return line;
  }));
  at("empty").hidden = state.history.length > 0;
}

function showFound() {
  const list = at("found");
  list.replaceChildren(...state.found.map((item, place) => {
    const line = element("li", item.title, { id: `found-${place}` });
    line.setAttribute("role", "option");
    line.setAttribute("aria-selected", String(place === state.marked));
    line.addEventListener("mousedown", (event) => { event.preventDefault(); take(place); });
    return line;
  }));
  list.hidden = state.found.length === 0;
  at("title").setAttribute("aria-expanded", String(state.found.length > 0));
  if (state.marked >= 0) {
    at("title").setAttribute("aria-activedescendant", `found-${state.marked}`);
    list.children[state.marked].scrollIntoView({ block: "nearest" });
  } else at("title").removeAttribute("aria-activedescendant");
}

function take(place) {
  state.history.push(state.found[place]);
  state.user = null;
  at("title").value = "";
  closeFound();
  showHistory();
}

function closeFound() {
  state.found = [];
  state.marked = -1;
  showFound();
}

const search = waited(async () => {
  const words = at("title").value.trim();
  if (!words) return closeFound();
  try {
    const found = await (await ask(`/v1/items?limit=8&title=${encodeURIComponent(words)}`)).json();
    if (words !== at("title").value.trim()) return;
    state.found = found;
    state.marked = found.length ? 0 : -1;
    showFound();
  } catch (error) { showProblem(error.message); }
});

const findUsers = waited(async () => {
  const beginning = at("user").value.trim();
  try {
    const users = await (await ask(`/v1/users?limit=20&beginning=${encodeURIComponent(beginning)}`)).json();
    at("users").replaceChildren(...users.map((user) => element("option", "", { value: user })));
  } catch (error) { showProblem(error.message); }
});

async function takeUser() {
  const user = at("user").value.trim();
  if (!user) return;
  try {
    state.history = await (await ask(`/v1/users/${encodeURIComponent(user)}/history?limit=20`)).json();
    state.user = user;
    showProblem("");
    showHistory();
  } catch (error) { showProblem(error.message); }
}

// ---- the answer

function showSteps(text) {
  const places = MARKERS.map((marker) => text.indexOf(marker)).filter((place) => place >= 0);
  const ends = [...places.slice(1), text.length];
  const steps = places.length ? places.map((place, number) => text.slice(place, ends[number])) : [text];
  at("steps").replaceChildren(...steps.map((step) => element("li", step.replace(/<\|[^|]*\|>/g, "◆").trim())));
}

function showItems(answer) {
  state.items = answer.items;
  state.chosen = 0;
  at("waiting").hidden = answer.items.length > 0;
  at("waiting").textContent = "No item is left to recommend.";
  at("items").replaceChildren(...answer.items.map((item, place) => {
    const line = element("li", "");
    const button = element("button", item.title, { type: "button" });
    button.addEventListener("click", () => { state.chosen = place; showChosen(); });
    line.append(button, element("span", ` ${item.score.toFixed(2)}`, { className: "score" }));
    return line;
  }));
  at("versions").textContent = `checkpoint ${answer.versions.checkpoint} · index ${answer.versions.index.slice(0, 12)}`;
  if (answer.chains?.length) {
    showSteps(answer.chains[0].think);
    const kept = answer.chains[0].rewritten_history.map((item) => item.title).join(", ");
    at("rewritten").textContent = `Rewritten history: ${kept || "nothing"}`;
    at("rewritten").hidden = false;
  }
  showChosen();
}

function showChosen() {
  [...at("items").children].forEach((line, place) =>
    line.firstChild.setAttribute("aria-pressed", String(place === state.chosen)));
  at("tree").hidden = state.items.length === 0;
  if (state.items.length) at("drawing").replaceChildren(tree(state.items, state.items[state.chosen]));
}

// The semantic IDs of the list as one tree from left to right, a column a level.
function tree(items, chosen) {
  const root = { label: "", children: new Map(), depth: 0 };
  for (const item of items) {
    let node = root;
    for (const token of item.path) {
      if (!node.children.has(token)) node.children.set(token, { label: token.replace(/[<|>]/g, ""), children: new Map(), depth: node.depth + 1 });
      node = node.children.get(token);
    }
    node.title = item.title;
  }
  let row = 0;
  const place = (node) => {
    const below = [...node.children.values()];
    below.forEach(place);
    node.y = below.length ? (below[0].y + below.at(-1).y) / 2 : 16 + 22 * row++;
    node.x = 10 + 76 * node.depth;
  };
  place(root);
  const depth = Math.max(...items.map((item) => item.path.length));
  const picture = svg("svg", { width: 10 + 76 * depth + 320, height: 16 + 22 * row, role: "img" });
  picture.setAttribute("aria-label", `Path of ${chosen.title}: ${chosen.path.join(" ")}`);
  const draw = (node, path, on) => {
    for (const [token, child] of node.children) {
      const here = on && chosen.path[path] === token;
      const middle = (node.x + child.x) / 2;
      picture.append(svg("path", { d: `M${node.x} ${node.y}C${middle} ${node.y} ${middle} ${child.y} ${child.x} ${child.y}`, class: here ? "chosen" : "" }));
      draw(child, path + 1, here);
      const text = svg("text", { x: child.x + 4, y: child.y - 3, class: here ? "chosen" : "" });
      text.textContent = child.title ? `${child.label}  ${child.title}` : child.label;
      picture.append(text);
    }
  };
  draw(root, 0, true);
  return picture;
}

function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

async function* events(response) {
  let left = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    const parts = (left + text).split("\n\n");
    left = parts.pop();
    for (const part of parts) {
      const [, name, data] = part.match(/^event: (.*)\ndata: (.*)$/s) ?? [];
      if (name) yield [name, JSON.parse(data)];
    }
  }
}

async function recommend(event) {
  event.preventDefault();
  const mode = new FormData(at("ask")).get("mode");
  state.stop = new AbortController();
  showProblem("");
  at("recommend").disabled = true;
  at("stop").hidden = false;
  at("items").replaceChildren();
  at("tree").hidden = true;
  at("steps").replaceChildren();
  at("rewritten").hidden = true;
  at("reasoning").hidden = mode === "direct";
  at("waiting").hidden = false;
  at("waiting").textContent = mode === "direct" ? "Ranking …" : "Thinking …";
  try {
    // Of a user the service knows the whole history, and this page the latest items alone.
    const whose = state.user === null ? { history: state.history.map((item) => item.item_id) } : { user_id: state.user };
    const body = JSON.stringify({ mode, k: 10, ...whose, stream: true });
    const response = await ask("/v1/recommend", { method: "POST", body, signal: state.stop.signal });
    let text = "";
    for await (const [name, data] of events(response)) {
      if (name === "chain") showSteps(text += data.text);
      else if (name === "restart") text = "";
      else if (name === "result") showItems(data);
      else if (name === "problem") throw new Error(data.detail);
    }
  } catch (error) {
    at("waiting").textContent = error.name === "AbortError" ? "Stopped." : "No answer.";
    if (error.name !== "AbortError") showProblem(error.message);
  } finally {
    at("recommend").disabled = false;
    at("stop").hidden = true;
  }
}

at("ask").addEventListener("submit", recommend);
at("stop").addEventListener("click", () => state.stop?.abort());
at("clear").addEventListener("click", () => { state.history = []; state.user = null; at("user").value = ""; showHistory(); });
at("user").addEventListener("input", findUsers);
at("user").addEventListener("change", takeUser);
at("title").addEventListener("input", search);
at("title").addEventListener("blur", closeFound);
at("title").addEventListener("keydown", (event) => {
  const steps = { ArrowDown: 1, ArrowUp: -1 };
  if (event.key in steps && state.found.length) {
    event.preventDefault();
    state.marked = (state.marked + steps[event.key] + state.found.length) % state.found.length;
    showFound();
  } else if (event.key === "Enter") {
    event.preventDefault();
    if (state.marked >= 0) take(state.marked);
  } else if (event.key === "Escape") closeFound();
});
at("key").addEventListener("change", findUsers);
at("key-field").hidden = !(await (await ask("/openapi.json")).json()).components?.securitySchemes;
if (at("key-field").hidden) findUsers();
