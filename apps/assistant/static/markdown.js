// Markdown to nodes: paragraphs, headings, lists, quotes, tables, code, emphasis, links. What a model or a
// person wrote only ever becomes text nodes, and the one attribute made of it is a link's http(s) address.
import { icon, make } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const DASHES = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 6; // lists in lists; further down everything is a paragraph
const LONGEST = 10_000; // characters of a paragraph in which marks are looked for

/** Show `text` in `node`. Called again with a longer text only what changed at its end is made anew. */
export function render(node, text) {
  const blocks = split(text.split("\n"));
  const before = node.sources ?? [];
  let same = 0;
  while (same < before.length && same < blocks.length && before[same] === blocks[same].source) same++;
  while (node.childNodes.length > same) node.lastChild.remove();
  const place = { level: headingLevel(node), depth: 0 };
  for (const block of blocks.slice(same)) node.append(build(block, place));
  node.sources = blocks.map((block) => block.source);
}

function headingLevel(node) {
  const last = [...node.children].findLast((child) => /^H[3-6]$/.test(child.tagName));
  return last ? Number(last.tagName[1]) : 2;
}

/** Lines as blocks: {kind, lines, source, ...}. */
function split(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const { end, ...block } = next(lines, at);
    blocks.push({ ...block, source: block.kind + lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

function next(lines, start) {
  const line = lines[start];
  const fence = FENCE.exec(line);
  if (fence) {
    const close = new RegExp(`^ {0,3}\\${fence[1][0]}{${fence[1].length},}[ \\t]*$`);
    let end = start + 1;
    while (end < lines.length && !close.test(lines[end])) end++;
    return { kind: "code", language: fence[2], lines: lines.slice(start + 1, end), end: Math.min(end + 1, lines.length) };
  }
  const heading = HEADING.exec(line);
  if (heading) return { kind: "heading", rank: heading[1].length, lines: [heading[2]], end: start + 1 };
  if (RULE.test(line)) return { kind: "rule", lines: [], end: start + 1 };
  if (QUOTE.test(line)) {
    let end = start;
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    return { kind: "quote", lines: lines.slice(start, end).map((inner) => inner.replace(QUOTE, "")), end };
  }
  if (ITEM.test(line)) return list(lines, start);
  if (line.includes("|") && lines[start + 1]?.includes("|") && DASHES.test(lines[start + 1])) {
    let end = start + 2;
    while (end < lines.length && lines[end].includes("|")) end++;
    return { kind: "table", lines: [line, ...lines.slice(start + 2, end)], end };
  }
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines[end])) end++;
  return { kind: "paragraph", lines: lines.slice(start, end), end };
}

const begins = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((mark) => mark.test(line));

function list(lines, start) {
  const ordered = /\d/.test(ITEM.exec(lines[start])[2]);
  const items = [];
  let end = start;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    if (!found || /\d/.test(found[2]) !== ordered || RULE.test(lines[end])) break;
    const inner = [lines[end].slice(found[0].length)];
    end++;
    // What is indented, or goes on without a mark, belongs to the item; so does an empty line between such lines.
    for (; end < lines.length; end++) {
      const gap = !lines[end].trim() && /^ {2,}|^\t/.test(lines[end + 1] ?? "");
      if (gap) inner.push("");
      else if (/^ {2,}|^\t/.test(lines[end])) inner.push(lines[end].replace(/^(?:\t| {2,4})/, ""));
      else if (lines[end].trim() && !begins(lines[end])) inner.push(lines[end]);
      else break;
    }
    items.push(inner);
    while (end < lines.length && !lines[end].trim() && ITEM.test(lines[end + 1] ?? "")) end++;
  }
  return { kind: "list", ordered, first: parseInt(ITEM.exec(lines[start])[2], 10), items, end };
}

function build(block, place) {
  switch (block.kind) {
    case "code":
      return code(block);
    case "heading":
      // Ranks become an outline below the page's own headings, without gaps.
      place.level = Math.min(block.rank + 2, place.level + 1, 6);
      return make(`h${place.level}`, {}, inline(block.lines[0]));
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, within(block.lines, place));
    case "list": {
      const items = block.items.map((lines) => make("li", {}, within(lines, place, true)));
      return make(block.ordered ? "ol" : "ul", block.ordered && block.first !== 1 ? { start: block.first } : {}, items);
    }
    case "table":
      return table(block.lines);
    default:
      return make("p", {}, paragraph(block.lines));
  }
}

/** What is inside a quote or an item; an item's single paragraph stands there without one. */
function within(lines, place, tight = false) {
  if (place.depth >= DEEPEST) return paragraph(lines);
  const deeper = { ...place, depth: place.depth + 1 };
  const blocks = split(lines);
  return blocks.map((block, at) => (tight && at === 0 && block.kind === "paragraph" ? paragraph(block.lines) : build(block, deeper))).flat();
}

function paragraph(lines) {
  return lines.flatMap((line, at) => [at ? make("br") : "", ...inline(line.trim())]);
}

function code({ language, lines }) {
  const copy = make("button", { type: "button", class: "quiet", "data-copy": true, "aria-label": "Copy code", title: "Copy code" }, icon("copy"));
  const name = language.slice(0, 20);
  return make(
    "div",
    { class: "code" },
    make("div", { class: "bar" }, make("span", {}, name || "text"), copy),
    make("pre", { tabindex: "0", role: "region", "aria-label": name ? `Code, ${name}` : "Code" }, make("code", {}, lines.join("\n"))),
  );
}

function table([head, ...rows]) {
  const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => inline(cell.trim()));
  const top = cells(head);
  const body = rows.map((row) => make("tr", {}, top.map((_, at) => make("td", {}, cells(row)[at] ?? []))));
  return make(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    make("table", {}, make("thead", {}, make("tr", {}, top.map((cell) => make("th", {}, cell)))), make("tbody", {}, body)),
  );
}

const INLINE = new RegExp(
  [
    /(?<tick>`+)(?<code>[^`]|[^`].*?[^`])\k<tick>(?!`)/,
    /!?\[(?<label>[^[\]]{0,500})\]\((?<to>[^\s()]{1,2000}(?:\([^\s()]*\)[^\s()]{0,500})?)(?:[ \t]+"[^"]*")?\)/,
    /(?<url>https?:\/\/[^\s<>"'`]{1,2000})/,
    /(?<strong>\*\*|__)(?=\S)(?<bold>.{1,2000}?\S|\S)\k<strong>/,
    /~~(?=\S)(?<gone>.{1,2000}?)~~/,
    /(?<mark>\*)(?=[^\s*])(?<stress>[^*]{1,2000}?[^\s*]|[^\s*])\*(?!\*)/,
    /(?<![\w_])_(?=[^\s_])(?<lean>[^_]{1,2000}?[^\s_]|[^\s_])_(?![\w_])/,
    /\\(?<plain>[!-/:-@[-`{-~])/,
  ]
    .map((part) => part.source)
    .join("|"),
  "gu",
);

/** A line as text, code, emphasis and links. */
function inline(line, depth = 0) {
  if (depth > 4 || line.length > LONGEST) return [line];
  const nodes = [];
  let at = 0;
  for (const match of line.matchAll(INLINE)) {
    nodes.push(line.slice(at, match.index));
    nodes.push(...mark(match, depth));
    at = match.index + match[0].length;
  }
  nodes.push(line.slice(at));
  return nodes.filter((node) => node !== "");
}

function mark({ 0: whole, groups }, depth) {
  const inner = (text) => inline(text, depth + 1);
  if (groups.code !== undefined) return [make("code", {}, groups.code.trim() || groups.code)];
  if (groups.to !== undefined) return link(groups.to, [groups.label || groups.to]) ?? [whole];
  if (groups.url !== undefined) {
    const tail = /[.,;:!?)\]*_]+$/.exec(groups.url)?.[0] ?? "";
    const url = groups.url.slice(0, groups.url.length - tail.length);
    return [...(link(url, [url]) ?? [url]), tail];
  }
  if (groups.bold !== undefined) return [make("strong", {}, inner(groups.bold))];
  if (groups.gone !== undefined) return [make("del", {}, inner(groups.gone))];
  if (groups.stress !== undefined) return [make("em", {}, inner(groups.stress))];
  if (groups.lean !== undefined) return [make("em", {}, inner(groups.lean))];
  return [groups.plain];
}

/** A link to the web, which opens elsewhere and shows where it leads; null where the address is anything else. */
function link(address, label) {
  if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) return null;
  const { href, protocol } = new URL(address);
  if (protocol !== "http:" && protocol !== "https:") return null;
  return [make("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" }, label)];
}
