// The page: what the user does, and what follows. Reading order: main, send, generate.

import * as api from "/page/api.js";
import { Store, request } from "/page/store.js";
import { Reply, counters, el, userMessage } from "/page/view.js";

const $ = (id) => document.getElementById(id);
const store = new Store();
let server = { id: "", max_model_len: 0 };
let running = null; // {controller} while a reply arrives

main();

function main() {
  theme(localStorage.getItem("fathom.theme"));
  wire();
  show();
  connect();
}

async function connect() {
  try {
    server = await api.model(key());
    $("model").textContent = server.id;
    count();
  } catch (error) {
    $("model").textContent = error.status === 401 ? "an API key is needed" : "no connection";
    if (error.status === 401) openSettings();
  }
}

function key() { return sessionStorage.getItem("fathom.key") ?? ""; }

// ---- sending ----

function send(text) {
  if (running || !text.trim()) return;
  const { messages } = store.current;
  const open = openCalls();
  if (open.length) { // a call without a result would be refused; what the user says instead is told
    for (const call of open) messages.push({ role: "tool", tool_call_id: call.id, content: "(no result was returned)" });
  }
  messages.push({ role: "user", content: text });
  store.save();
  show();
  generate();
}

/** Write the next message of the conversation. */
async function generate() {
  const conversation = store.current;
  const message = { role: "assistant", content: "", meta: {} };
  let body;
  try {
    body = request(conversation, server.id || "fathom");
  } catch (error) {
    conversation.messages.push({ ...message, meta: { problem: `the tools are no JSON: ${error.message}` } });
    store.save();
    show();
    return;
  }
  conversation.messages.push(message);
  const reply = addReply(conversation, message, true);
  const controller = new AbortController();
  running = { controller };
  busy(true);
  const begun = performance.now();
  let first = 0;
  const drawn = frames(() => { reply.update(); follow(); });
  try {
    await api.reply(body, key(), controller.signal, (piece) => {
      first ||= performance.now();
      take(message, piece, begun);
      drawn.request();
    });
  } catch (error) {
    if (controller.signal.aborted) message.meta.stopped = true;
    else message.meta.problem = explain(error);
  }
  message.meta.seconds = (performance.now() - (first || begun)) / 1000;
  drawn.cancel();
  running = null;
  busy(false);
  store.save();
  if (store.current === conversation) show();
  else list();
  $("spoken").textContent = message.meta.problem ?? message.content.slice(0, 400) ?? "";
}

/** Put one piece of a reply into its message. */
function take(message, piece, begun) {
  const { meta } = message;
  if (piece.reasoning) message.reasoning_content = (message.reasoning_content ?? "") + piece.reasoning;
  if ((piece.content || piece.call) && message.reasoning_content) meta.thought ??= (performance.now() - begun) / 1000;
  if (piece.content) message.content += piece.content;
  if (piece.call) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[piece.call.index] ??= { id: piece.call.id, type: "function", function: { name: piece.call.name, arguments: "" } });
    call.function.arguments += piece.call.arguments;
  }
  if (piece.finish) meta.finish = piece.finish;
  if (piece.usage) meta.usage = piece.usage;
  if (piece.notice) meta.notice = piece.notice;
}

/** At most one drawing a frame, however fast the pieces come. */
function frames(draw) {
  let waiting = 0;
  return {
    request() { waiting ||= requestAnimationFrame(() => { waiting = 0; draw(); }); },
    cancel() { cancelAnimationFrame(waiting); waiting = 0; },
  };
}

function explain(error) {
  if (error instanceof api.ApiError) return error.status === 401 ? "The server wants an API key: open the settings." : error.message;
  return error instanceof TypeError ? "The server cannot be reached." : error.message;
}

// ---- calls and their results ----

function openCalls() {
  const { messages } = store.current;
  const at = messages.findLastIndex((m) => m.role === "assistant");
  const calls = at < 0 ? [] : messages[at].tool_calls ?? [];
  const answered = new Set(messages.slice(at + 1).map((m) => m.tool_call_id));
  return calls.filter((call) => !answered.has(call.id));
}

function answer(call, text) {
  if (running) return;
  store.current.messages.push({ role: "tool", tool_call_id: call.id, content: text });
  store.save();
  show();
  if (!openCalls().length) generate();
}

function retry() {
  if (running) return;
  const { messages } = store.current;
  while (messages.length && messages.at(-1).role === "assistant") messages.pop();
  store.save();
  show();
  generate();
}

// ---- drawing ----

function show() {
  const { messages, settings } = store.current;
  $("log").replaceChildren();
  if (!messages.length) {
    $("log").append(el("div", { className: "empty" }, el("h1", { textContent: "What is on your mind?" }),
      el("p", { textContent: "Conversations stay in this browser." })));
  }
  for (const message of messages) {
    if (message.role === "user") $("log").append(userMessage(message));
    else if (message.role === "assistant") addReply(store.current, message, false);
  }
  document.querySelector(`input[name=mode][value=${settings.mode}]`).checked = true;
  $("log").scrollTop = $("log").scrollHeight;
  list();
  count();
}

function addReply(conversation, message, live) {
  const { messages } = conversation;
  const at = messages.indexOf(message);
  const results = new Map();
  for (const later of messages.slice(at + 1)) {
    if (later.role !== "tool") break;
    results.set(later.tool_call_id, later);
  }
  const last = at === messages.length - 1;
  const reply = new Reply(message, results, { answer, retry: last ? retry : null });
  reply.live = live;
  reply.update();
  $("log").append(reply.node);
  follow();
  return reply;
}

/** Stay at the end, unless the reader has scrolled up. */
function follow() {
  const log = $("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function list() {
  $("list").replaceChildren(...store.all.filter((c) => c.messages.length || c === store.current).map((c) => {
    const title = c.title || "New conversation";
    const open = el("button", { className: "open", textContent: title });
    open.addEventListener("click", () => { if (!running) { store.open(c.id); show(); narrow(false); $("input").focus(); } });
    const drop = el("button", { className: "icon drop", ariaLabel: `Delete ${title}`, textContent: "\u00d7" });
    drop.addEventListener("click", () => { if (!running) { store.drop(c.id); show(); } });
    const item = el("li", { className: c === store.current ? "current" : "" }, open, drop);
    if (c === store.current) open.setAttribute("aria-current", "true");
    return item;
  }));
}

function count() { $("counters").textContent = counters(store.current.messages, server.max_model_len); }

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  if (!on) $("input").focus();
}

function theme(chosen) {
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function narrow(open) { document.body.classList.toggle("side-open", open); }

// ---- dialogs ----

async function openPrompt() {
  const text = $("prompt-text");
  text.replaceChildren();
  $("prompt-facts").textContent = "";
  $("prompt-dialog").showModal();
  // The prompt that the last reply answered; before any reply, the one to come.
  const { messages } = store.current;
  const end = messages.findLastIndex((m) => m.role === "assistant");
  const asked = end < 0 ? messages : messages.slice(0, end);
  if (!asked.length) { $("prompt-facts").textContent = "There is no message yet."; return; }
  try {
    const made = await api.render(request({ ...store.current, messages: asked }, server.id), key());
    const ids = made.token_ids ? "" : ", not counted exactly";
    $("prompt-facts").textContent = `${made.tokens.toLocaleString("en")} tokens${ids}; thinking ${made.thinking}; prompts of ${made.revision}`;
    // Special tokens stand out; what only looks like one, in a user's text, does not.
    text.append(...made.segments.map((part) => (part.special ? el("mark", { textContent: part.text }) : part.text)));
  } catch (error) {
    $("prompt-facts").textContent = explain(error);
  }
}

function openSettings() {
  const form = $("settings-form");
  const { settings } = store.current;
  for (const name of ["system", "tools", "temperature", "max_tokens"]) form.elements[name].value = settings[name];
  form.elements.key.value = key();
  $("tools-error").hidden = true;
  $("settings-dialog").showModal();
}

function saveSettings(event) {
  const form = $("settings-form");
  const tools = form.elements.tools.value;
  try {
    if (tools.trim() && !Array.isArray(JSON.parse(tools))) throw new Error("it must be a list");
  } catch (error) {
    event.preventDefault();
    $("tools-error").textContent = `The tools cannot be read: ${error.message}`;
    $("tools-error").hidden = false;
    return;
  }
  for (const name of ["system", "tools", "temperature", "max_tokens"]) store.current.settings[name] = form.elements[name].value;
  sessionStorage.setItem("fathom.key", form.elements.key.value);
  store.save();
  connect();
}

// ---- events ----

function wire() {
  const input = $("input");
  const grow = () => { input.style.height = "auto"; input.style.height = `${input.scrollHeight}px`; };
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("composer").requestSubmit();
    }
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running || !input.value.trim()) return;
    const text = input.value;
    input.value = "";
    grow();
    send(text);
  });
  $("stop").addEventListener("click", () => running?.controller.abort());
  $("new").addEventListener("click", () => { if (!running) { store.begin(); store.save(); show(); narrow(false); input.focus(); } });
  $("prompt").addEventListener("click", openPrompt);
  $("prompt-copy").addEventListener("click", () => navigator.clipboard.writeText($("prompt-text").textContent));
  $("settings").addEventListener("click", openSettings);
  $("settings-form").addEventListener("submit", saveSettings);
  $("open-side").addEventListener("click", () => { narrow(true); $("close-side").focus(); });
  $("close-side").addEventListener("click", () => narrow(false));
  $("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("fathom.theme", next);
    theme(next);
  });
  for (const node of document.querySelectorAll("[data-close]")) node.addEventListener("click", () => node.closest("dialog").close());
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => { store.current.settings.mode = radio.value; store.save(); });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      if (document.querySelector("dialog[open]")) return;
      running?.controller.abort();
      narrow(false);
    }
    if (!event.altKey || event.ctrlKey || event.metaKey) return;
    const action = { n: "new", p: "prompt", s: "settings" }[event.key.toLowerCase()];
    if (action) { event.preventDefault(); $(action).click(); }
  });
  // A tab that closes while a reply arrives keeps what has come.
  addEventListener("pagehide", () => store.save());
}
