// Conversations live in this browser. A message is what the API takes, with `meta` beside it.

const PLACE = "fathom.conversations";
const MOST = 50;

export class Store {
  constructor() {
    let saved = null;
    try { saved = JSON.parse(localStorage.getItem(PLACE)); } catch { /* damaged: begin anew */ }
    this.all = Array.isArray(saved?.all) ? saved.all : [];
    this.current = this.all.find((c) => c.id === saved?.current) ?? this.begin();
  }

  begin() {
    const kept = this.all.find((c) => c.messages.length === 0);
    if (kept) { this.current = kept; return kept; }
    const { system = "", tools = "", mode = "high", temperature = "", max_tokens = "" } = this.current?.settings ?? {};
    const made = { id: crypto.randomUUID?.() ?? String(Math.random()).slice(2), title: "", messages: [], settings: { system, tools, mode, temperature, max_tokens } };
    this.all.unshift(made);
    this.current = made;
    return made;
  }

  open(id) { this.current = this.all.find((c) => c.id === id) ?? this.current; this.save(); }

  drop(id) {
    this.all = this.all.filter((c) => c.id !== id);
    if (this.current.id === id) this.current = this.all[0] ?? this.begin();
    this.save();
  }

  save() {
    if (!this.current.title) {
      const first = this.current.messages.find((m) => m.role === "user");
      if (first) this.current.title = first.content.trim().split("\n")[0].slice(0, 60);
    }
    for (let kept = this.all.slice(0, MOST); ; kept = kept.slice(0, -1)) {
      try {
        localStorage.setItem(PLACE, JSON.stringify({ all: kept, current: this.current.id }));
        return;
      } catch (error) {
        if (kept.length <= 1) { console.warn("this conversation is too long to be kept", error); return; }
      }
    }
  }
}

/** The body of a request for the next message of a conversation. */
export function request(conversation, model) {
  const { settings } = conversation;
  const messages = conversation.messages.map(({ meta, ...message }) => message);
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const body = { model, messages, thinking: { type: settings.mode === "off" ? "disabled" : "enabled" } };
  if (settings.mode !== "off") body.reasoning_effort = settings.mode;
  if (settings.tools.trim()) body.tools = JSON.parse(settings.tools);
  if (settings.temperature !== "") body.temperature = Number(settings.temperature);
  if (settings.max_tokens !== "") body.max_tokens = Number(settings.max_tokens);
  return body;
}
