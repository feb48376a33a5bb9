// Messages as nodes. A reply in progress is rebuilt part by part, and only the parts that changed.

import { markdown } from "/page/markdown.js";

export function el(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

export function userMessage(message) {
  return el("article", { className: "message user" }, el("div", { className: "bubble", textContent: message.content }));
}

const FINISH = {
  length: "cut at the token limit",
  content_filter: "stopped by a filter",
};

/**
 * One reply. `results` maps call ids to tool messages; `actions` has answer(call, text) and retry().
 * `update()` shows what has changed in the message since.
 */
export class Reply {
  constructor(message, results, actions) {
    this.message = message;
    this.results = results;
    this.actions = actions;
    this.live = false;
    this.summary = el("summary");
    this.thoughtText = el("div");
    this.thought = el("details", { className: "thought", hidden: true }, this.summary, this.thoughtText);
    this.touched = false;
    this.summary.addEventListener("click", () => { this.touched = true; });
    this.text = el("div", { className: "text" });
    this.cards = el("div");
    this.problem = el("p", { className: "problem", hidden: true });
    this.foot = el("p", { className: "foot" });
    this.node = el("article", { className: "message assistant" }, this.thought, this.text, this.cards, this.problem, this.foot);
    this.update();
  }

  update() {
    const { message } = this;
    const meta = message.meta ?? {};
    const thinking = this.live && !message.content && !message.tool_calls;
    this.thought.hidden = !message.reasoning_content;
    if (message.reasoning_content) {
      if (!this.touched) this.thought.open = thinking;
      this.thought.classList.toggle("working", thinking);
      const seconds = meta.thought ? `${meta.thought.toFixed(1)} s` : "";
      this.summary.textContent = thinking ? "Thinking" : `Thought${seconds ? ` for ${seconds}` : ""}`;
      if (this.thoughtText.textContent !== message.reasoning_content) this.thoughtText.textContent = message.reasoning_content;
    }
    if (this.shown !== message.content) {
      this.shown = message.content;
      this.text.replaceChildren(markdown(message.content ?? ""));
    }
    const waiting = this.live && !message.content && !message.reasoning_content && !message.tool_calls;
    this.text.classList.toggle("caret", waiting);
    (this.text.lastElementChild ?? this.text).classList.toggle("caret", this.live && !thinking && !message.tool_calls);
    this.showCards();
    this.problem.hidden = !meta.problem;
    this.problem.textContent = meta.problem ?? "";
    this.showFoot(meta);
  }

  showCards() {
    const state = JSON.stringify([this.message.tool_calls, [...this.results], this.live]);
    if (state === this.cardState) return;
    this.cardState = state;
    this.cards.replaceChildren(...(this.message.tool_calls ?? []).map((call) => this.card(call)));
  }

  card(call) {
    const result = this.results.get(call.id);
    const state = this.live ? "being written" : result ? "answered" : "waits for a result";
    const card = el("section", { className: "card", ariaLabel: `Call of ${call.function.name}` },
      el("div", { className: "title" }, "Call of ", el("b", { textContent: call.function.name }), el("span", { className: "state", textContent: state })),
      el("pre", { textContent: pretty(call.function.arguments) }));
    if (result) {
      card.append(el("div", { className: "result" }, el("div", { className: "label", textContent: "Result" }), el("pre", { textContent: result.content })));
    } else if (!this.live) {
      const text = el("textarea", { rows: 3, ariaLabel: `Result of ${call.function.name}`, placeholder: "What the tool returned" });
      const send = el("button", { type: "button", textContent: "Return this result" });
      send.addEventListener("click", () => this.actions.answer(call, text.value));
      text.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send.click(); }
      });
      card.append(el("div", { className: "answer" }, text, el("div", { className: "row" }, send)));
    }
    return card;
  }

  showFoot(meta) {
    const facts = [];
    if (meta.stopped) facts.push("stopped");
    if (FINISH[meta.finish]) facts.push(FINISH[meta.finish]);
    if (meta.notice) facts.push(meta.notice);
    if (meta.usage) facts.push(...usageFacts(meta));
    const nodes = facts.map((fact) => el("span", { textContent: fact }));
    if (!this.live) {
      if (this.message.content) nodes.push(button("Copy", () => navigator.clipboard.writeText(this.message.content)));
      if (this.actions.retry) nodes.push(button("Try again", this.actions.retry));
    }
    this.foot.replaceChildren(...nodes);
  }
}

function button(text, action) {
  const node = el("button", { type: "button", textContent: text });
  node.addEventListener("click", action);
  return node;
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

function usageFacts({ usage, seconds }) {
  const thought = usage.completion_tokens_details?.reasoning_tokens ?? 0;
  const facts = [`${usage.completion_tokens} tokens${thought ? `, ${thought} of them thoughts` : ""}`];
  if (seconds > 0) facts.push(`${Math.round(usage.completion_tokens / seconds)} tokens/s`);
  return facts;
}

/** Counters of the whole conversation after its last reply, as one line. */
export function counters(messages, context) {
  const last = messages.findLast((m) => m.meta?.usage)?.meta.usage;
  if (!last) return "";
  const cached = last.prompt_tokens_details?.cached_tokens ?? last.prompt_cache_hit_tokens ?? 0;
  const used = last.prompt_tokens + last.completion_tokens;
  const share = context ? ` of ${context.toLocaleString("en")}` : "";
  return `context ${used.toLocaleString("en")}${share} tokens; prompt ${last.prompt_tokens.toLocaleString("en")}, ${cached.toLocaleString("en")} from the cache`;
}
