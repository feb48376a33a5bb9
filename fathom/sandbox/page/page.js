// Shows what the server tells, again every two seconds. Everything that comes from sandboxes is text,
// never markup: nodes are made here and filled by textContent alone.

const key = location.hash.slice(1);
const find = (id) => document.getElementById(id);
let chosen = null;
let shown = "";

function make(kind, looks, ...parts) {
  const node = document.createElement(kind);
  if (looks) node.className = looks;
  node.append(...parts);
  return node;
}

async function ask(path) {
  const answer = await fetch(path, { headers: { Authorization: `Bearer ${key}` } });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

function since(seconds) {
  const past = Math.max(0, Date.now() / 1000 - seconds);
  if (past < 90) return `${Math.round(past)} s ago`;
  if (past < 5400) return `${Math.round(past / 60)} min ago`;
  return past < 172800 ? `${Math.round(past / 3600)} h ago` : `${Math.round(past / 86400)} days ago`;
}

function network(net) {
  if (!net) return "no network";
  const names = [
    ...net.addresses.map((pair) => pair.join(":")),
    ...net.domains.map((pair) => pair[0]),
    ...net.mirrors.map((name) => `mirror ${name}`),
  ];
  return names.length ? names.join(", ") : "no network";
}

function limits(spec) {
  const names = ["memory", "cpu", "pids", "disk"].filter((name) => spec[name] != null);
  return names.map((name) => `${name} ${spec[name]}`).join(", ");
}

function box(entry, children) {
  const head = make("div", "row", make("span", "name", entry.id), make("span", "tag", entry.caps.substrate));
  if (entry.group) head.append(make("span", "tag", `group ${entry.group}`));
  if (entry.paused) head.append(make("span", "tag warn", "paused"));
  const about = [entry.spec.image, limits(entry.spec), network(entry.net), `made ${since(entry.created)}`];
  if (entry.phase) about.push(`phase ${entry.phase}`);
  const card = make("div", "card", head, make("div", "muted", about.filter(Boolean).join(" · ")));
  const item = make("li", "", card);
  item.dataset.id = entry.id;
  if (children.length) item.append(make("ul", "", ...children));
  return item;
}

// Copies stand below what they were copied from, as long as that is there.
function trees(entries) {
  const names = new Set(entries.map((entry) => entry.id));
  const below = new Map();
  for (const entry of entries) {
    const parent = names.has(entry.parent) ? entry.parent : "";
    below.set(parent, [...(below.get(parent) || []), entry]);
  }
  const grow = (parent) => (below.get(parent) || []).map((entry) => box(entry, grow(entry.id)));
  return grow("");
}

function runCard(run) {
  const state = { ended: "good", running: "warn" }[run.state] || "bad";
  const head = make("div", "row", make("span", "name", run.run), make("span", `tag ${state}`, run.state));
  const count = `${run.operations} operations · ${since(run.begun_ns / 1e9)}`;
  const card = make("button", "card", head, make("div", "", String(run.task ?? "")), make("div", "muted", count));
  card.type = "button";
  card.setAttribute("aria-pressed", String(run.run === chosen));
  card.addEventListener("click", () => {
    chosen = run.run;
    shown = "";
    refresh();
  });
  return make("li", "", card);
}

function said(value) {
  return typeof value === "string" ? value : value == null ? "" : JSON.stringify(value, null, 1);
}

function step(event) {
  const asked = event.request?.arguments ?? {};
  const what = asked.command ?? asked.path ?? event.key ?? "";
  const text = Array.isArray(what) ? what.join(" ") : String(what);
  const head = make("div", "row", make("span", "tag", event.kind), make("code", "", text));
  const item = make("li", "card", head);
  const outcome = event.outcome;
  if (outcome) {
    const code = outcome.exit_code ?? outcome.fields?.exit_code;
    if (code != null) head.append(make("span", code === 0 ? "good" : "bad", `exit ${code}`));
    const output = [outcome.stdout, outcome.stderr, outcome.blobs?.stdout, outcome.blobs?.stderr].map(said);
    const whole = output.filter(Boolean).join("\n");
    if (whole) item.append(make("pre", "", whole));
  } else if (event.fields && Object.keys(event.fields).length && event.kind !== "intent") {
    item.append(make("div", "muted", said(event.fields)));
  }
  if (event.kind === "unknown") item.classList.add("bad");
  return item;
}

async function showRun() {
  const run = await ask(`/runs/${encodeURIComponent(chosen)}`);
  const text = JSON.stringify(run);
  if (text === shown) return;
  shown = text;
  find("run").hidden = false;
  find("run-title").textContent = run.run;
  find("run-about").textContent = String(run.task ?? "");
  find("steps").replaceChildren(...run.events.filter((event) => event.kind !== "started").map(step));
}

async function refresh() {
  try {
    const all = await ask("/overview");
    find("boxes").replaceChildren(...trees(all.sandboxes));
    find("runs").replaceChildren(...all.runs.map(runCard));
    find("no-boxes").hidden = all.sandboxes.length > 0;
    find("no-boxes").textContent = all.problem || "None: the daemon has no sandbox.";
    find("no-runs").hidden = all.runs.length > 0;
    if (chosen) await showRun();
    find("status").textContent = "";
  } catch (problem) {
    find("status").textContent = problem.message;
  }
}

refresh();
setInterval(() => document.hidden || refresh(), 2000);
