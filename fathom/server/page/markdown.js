// A small, safe Markdown: it builds nodes and never parses HTML, whatever a model writes.

export function markdown(text) {
  const root = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const fence = line.match(/^\s*(`{3,}|~{3,})\s*(\S*)/);
    if (fence) {
      const body = [];
      for (at++; at < lines.length && !lines[at].trim().startsWith(fence[1]); at++) body.push(lines[at]);
      at++;
      root.append(codeBlock(body.join("\n")));
    } else if (/^\s*$/.test(line)) {
      at++;
    } else if (/^#{1,6}\s/.test(line)) {
      const level = Math.min(3, line.match(/^#+/)[0].length);
      root.append(inline(document.createElement(`h${level}`), line.replace(/^#+\s*/, "")));
      at++;
    } else if (/^\s*>/.test(line)) {
      const body = [];
      for (; at < lines.length && /^\s*>/.test(lines[at]); at++) body.push(lines[at].replace(/^\s*> ?/, ""));
      const quote = document.createElement("blockquote");
      quote.append(markdown(body.join("\n")));
      root.append(quote);
    } else if (ITEM.test(line)) {
      at = list(root, lines, at);
    } else {
      const body = [];
      for (; at < lines.length && lines[at].trim() && !/^\s*(`{3,}|~{3,}|#{1,6}\s|>)/.test(lines[at]) && !(body.length && ITEM.test(lines[at])); at++) body.push(lines[at]);
      root.append(inline(document.createElement("p"), body.join("\n")));
    }
  }
  return root;
}

const ITEM = /^\s*([-*+]|\d{1,9}[.)])\s+/;

function list(root, lines, at) {
  const ordered = /^\s*\d/.test(lines[at]);
  const element = document.createElement(ordered ? "ol" : "ul");
  if (ordered) element.start = parseInt(lines[at].trim(), 10);
  for (; at < lines.length && ITEM.test(lines[at]) && /^\s*\d/.test(lines[at]) === ordered; ) {
    const body = [lines[at].replace(ITEM, "")];
    for (at++; at < lines.length && /^\s{2,}\S/.test(lines[at]) && !ITEM.test(lines[at]); at++) body.push(lines[at].trim());
    element.append(inline(document.createElement("li"), body.join("\n")));
  }
  root.append(element);
  return at;
}

function codeBlock(text) {
  const box = document.createElement("div");
  box.className = "fence";
  const pre = document.createElement("pre");
  const code = document.createElement("code");
  code.textContent = text;
  pre.append(code);
  const copy = document.createElement("button");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  box.append(pre, copy);
  return box;
}

const INLINE = /(`+)([^`](?:.*?[^`])?)\1(?!`)|\*\*(?=\S)(.+?)\*\*|\*(?=\S)([^*\n]+?)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/s;

function inline(element, text) {
  for (let found; (found = INLINE.exec(text)); ) {
    element.append(text.slice(0, found.index));
    const [all, , code, strong, soft, label, address] = found;
    let node;
    if (code !== undefined) { node = document.createElement("code"); node.textContent = code; }
    else if (strong !== undefined) node = inline(document.createElement("strong"), strong);
    else if (soft !== undefined) node = inline(document.createElement("em"), soft);
    else {
      node = document.createElement("a");
      node.textContent = label;
      node.href = address;
      node.rel = "noopener noreferrer";
      node.target = "_blank";
    }
    element.append(node);
    text = text.slice(found.index + all.length);
  }
  element.append(text);
  return element;
}
