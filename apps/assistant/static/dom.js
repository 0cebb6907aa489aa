// The page's small tools: nodes, icons, announcements, dialogs. Text is always text: nothing here parses HTML.

const MS_A_SIGN = 60; // how long a note is shown, by its length
const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  plus: "M12 5v14M5 12h14",
  search: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14zM20 20l-4-4",
  menu: "M4 7h16M4 12h16M4 17h10",
  close: "M6 6l12 12M18 6L6 18",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8z",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  again: "M20 11a8 8 0 1 0-2.3 6.3M20 4v7h-7",
  up: "M7 11v9H4v-9zM7 11l4-7.5c1.6 0 2.4 1 2.1 2.5L12.5 9H18a2 2 0 0 1 2 2.3l-1 7A2 2 0 0 1 17 20H7",
  down: "M7 13V4H4v9zM7 13l4 7.5c1.6 0 2.4-1 2.1-2.5l-.6-3H18a2 2 0 0 0 2-2.3l-1-7A2 2 0 0 0 17 4H7",
  two: "M4 5h7v14H4zM13 5h7v14h-7z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  save: "M12 4v11M7 11l5 5 5-5M5 20h14",
  taste: "M12 20s-7.5-4.6-7.5-10A4.2 4.2 0 0 1 12 7.3 4.2 4.2 0 0 1 19.5 10c0 5.4-7.5 10-7.5 10z",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.8v4.4M9 14.8v4.4",
  keys: "M3 7h18v10H3zM7 10.5h.01M11 10.5h.01M15 10.5h.01M8 14h8",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  bottom: "M12 5v14M6 13l6 6 6-6",
  contrast: "M12 3.5a8.5 8.5 0 1 0 0 17zM12 3.5a8.5 8.5 0 0 1 0 17",
};

/** A node. `properties`: on... are listeners, booleans are attributes or none, the rest are attributes. */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", "aria-hidden": "true", class: "icon" })) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that is an icon; its name is for screen readers and the pointer that rests on it. */
export function iconButton(name, label, onclick, properties = {}) {
  return make("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick, ...properties }, icon(name));
}

export const find = (selector) => document.querySelector(selector);

/** Said once by screen readers. */
export function announce(text) {
  find("#said").textContent = "";
  requestAnimationFrame(() => (find("#said").textContent = text));
}

const note = find("#toast");
let toastTimer;
/** A short note at the bottom that goes away by itself; of an open dialog it is a part, or it would lie below. */
export function toast(text) {
  const tell = () => ((note.textContent = text), note.classList.add("shown"));
  const host = [...document.querySelectorAll("dialog[open]:not(.small)")].at(-1) ?? document.body;
  if (note.parentNode === host) tell();
  else host.append(note), requestAnimationFrame(tell); // a screen reader hears what changes in what is there already
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => note.classList.remove("shown"), Math.max(4000, MS_A_SIGN * text.length));
}

/** Ask in a dialog; resolves to true, or to the text of its field, or to null when it was dismissed. */
export function ask({ title, text = "", field = null, value = "", limit = 200, yes, danger = false }) {
  return new Promise((resolve) => {
    const input = field && make("input", { type: "text", id: "asked", maxlength: limit, autocomplete: "off" });
    if (input) input.value = value;
    const form = make(
      "form",
      { onsubmit: (event) => (event.preventDefault(), finish(input ? input.value.trim() || null : true)) },
      make("h2", { id: "asking" }, title),
      text && make("p", {}, text),
      input && make("label", { for: "asked" }, field),
      input,
      make(
        "div",
        { class: "buttons" },
        make("button", { type: "button", class: "plain", onclick: () => finish(null) }, "Cancel"),
        make("button", { type: "submit", class: danger ? "danger" : "primary" }, yes),
      ),
    );
    const dialog = make("dialog", { class: "small", "aria-labelledby": "asking" }, form);
    const finish = (answer) => (dialog.remove(), before?.focus?.(), resolve(answer));
    const before = document.activeElement;
    dialog.addEventListener("cancel", (event) => (event.preventDefault(), finish(null)));
    document.body.append(dialog);
    dialog.showModal();
    input?.select();
  });
}

/** Open a dialog of the page; it closes by its button, by Escape, and by a press beside it. */
export function openDialog(dialog) {
  if (dialog.open) return;
  dialog.showModal();
  if (dialog.dataset.ready) return;
  dialog.dataset.ready = "yes";
  dialog.addEventListener("mousedown", (event) => event.target === dialog && dialog.close());
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
}

/** "today", "yesterday", "this week", or the month. */
export function dayOf(seconds, now = new Date()) {
  const then = new Date(seconds * 1000);
  const midnight = (date) => new Date(date.getFullYear(), date.getMonth(), date.getDate()).getTime();
  const days = Math.round((midnight(now) - midnight(then)) / 86_400_000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  if (days < 7) return "Last seven days";
  return then.toLocaleDateString("en", { month: "long", year: "numeric" });
}

/** Give somebody a file that the page has in its hands. */
export function offer(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
