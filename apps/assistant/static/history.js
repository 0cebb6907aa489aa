// Conversations: found, opened, renamed, exported, deleted.
import { call, text } from "./api.js";
import { ask, dayOf, find, iconButton, make, offer, toast } from "./dom.js";
import { attempt, changed, loadState, on, session, settings, show } from "./session.js";

const PAGE = 60;
const list = find("#conversations");
const search = find("#search");
let shown = PAGE;
let asked = 0;
let timer;

export function start() {
  search.addEventListener("input", () => (clearTimeout(timer), (timer = setTimeout(() => ((shown = PAGE), draw()), 150))));
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && search.value) (event.stopPropagation(), (search.value = ""), draw());
    if (event.key === "ArrowDown") (event.preventDefault(), list.querySelector("a")?.focus());
  });
  list.addEventListener("keydown", walk);
  find("#new").addEventListener("click", begin);
  on("history", draw);
  on("state", draw);
  on("opened", () => (mark(), draw()));
  window.addEventListener("focus", draw); // another program may have added to it
}

/** A new conversation. */
export function begin() {
  if (location.hash) window.history.pushState(null, "", "#"); // at once: what is typed next belongs to the new one
  show(null);
  find("#field").focus();
}

async function draw() {
  if (!session.info) return;
  const mine = ++asked;
  const query = new URLSearchParams({ query: search.value.trim(), user: settings().user, limit: shown + 1 });
  const found = await call("GET", `/api/conversations?${query}`).catch(() => null);
  if (!found || mine !== asked) return; // a later question has been asked by now
  const place = document.activeElement?.closest("#conversations li")?.dataset.id;
  const name = document.activeElement?.dataset.act;
  const days = new Map();
  for (const entry of found.slice(0, shown)) {
    const day = dayOf(entry.updated_s);
    days.set(day, [...(days.get(day) ?? []), entry]);
  }
  const groups = [...days].map(([day, entries], at) => make("section", { "aria-labelledby": `day-${at}` }, make("h3", { id: `day-${at}` }, day), make("ul", {}, entries.map(item))));
  const more = found.length > shown && make("button", { type: "button", class: "plain more", onclick: () => ((shown += PAGE), draw()) }, "Show more");
  list.replaceChildren(...(groups.length ? groups : [empty()]), ...(more ? [more] : []));
  if (place) list.querySelector(`[data-id="${place}"] [data-act="${name}"]`)?.focus();
  mark();
}

const empty = () => make("p", { class: "empty" }, search.value.trim() ? "Nothing found." : "Conversations will be kept here, on this machine.");

function item(entry) {
  const title = entry.title || "New conversation";
  return make(
    "li",
    { "data-id": entry.id },
    make("a", { href: `#/c/${entry.id}`, title, "data-act": "open" }, title),
    make(
      "span",
      { class: "tools" },
      iconButton("edit", `Rename ${title}`, () => attempt(() => rename(entry)), { "data-act": "rename" }),
      iconButton("save", `Export ${title}`, () => attempt(() => exportJson(entry)), { "data-act": "export" }),
      iconButton("trash", `Delete ${title}`, () => attempt(() => remove(entry, title)), { "data-act": "delete" }),
    ),
  );
}

/** Which conversation is on show. */
function mark() {
  for (const link of list.querySelectorAll("a")) {
    if (link.closest("li").dataset.id === session.conversation?.id) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function walk(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || event.target.tagName !== "A") return;
  event.preventDefault();
  const links = [...list.querySelectorAll("a")];
  (links[links.indexOf(event.target) + step] ?? (step < 0 ? search : null))?.focus();
}

async function rename(entry) {
  const title = await ask({ title: "Rename conversation", field: "Title", value: entry.title, yes: "Rename" });
  if (!title) return;
  const found = await call("PATCH", `/api/conversations/${entry.id}`, { title });
  if (session.conversation?.id === entry.id) session.conversation = found;
  changed(entry.id);
}

async function remove(entry, title) {
  const text = `“${title}” is removed with its answers, thumbs and choices, from the disk too.`;
  if (!(await ask({ title: "Delete conversation?", text, yes: "Delete", danger: true }))) return;
  session.writing.get(entry.id)?.abort.abort();
  await call("DELETE", `/api/conversations/${entry.id}`);
  if (session.conversation?.id === entry.id) begin();
  changed(entry.id, { gone: { id: entry.id, user: entry.user } });
  toast("Deleted.");
}

/** One conversation, or all of them, as a file. */
export async function exportJson(entry = null) {
  const name = entry ? (entry.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) : "conversations";
  offer(`edgealign-${name}.json`, await text(`/api/export${entry ? `?conversation=${entry.id}` : ""}`), "application/json");
}

/** Read a file that was exported before; what is there already stays as it is. */
export async function importJson(file) {
  let archive;
  try {
    archive = JSON.parse(await file.text());
  } catch {
    return toast(`${file.name} is no JSON file.`);
  }
  const { imported, skipped } = await call("POST", "/api/import", archive);
  changed(null);
  await loadState(); // there may be other people in it
  return toast(`${imported} imported${skipped ? `, ${skipped} were here already` : ""}.`);
}
