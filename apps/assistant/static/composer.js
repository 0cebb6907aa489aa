// Where questions are written: it grows with its text, keeps drafts, and never sends half of a composed character.
import { find, icon } from "./dom.js";
import { attempt, on, say, session, stop, written } from "./session.js";
import { editLast } from "./chat.js";

const field = find("#field");
const form = find("#composer");
const button = find("#send");
const two = find("#two");

export function start() {
  field.addEventListener("input", () => (keep(), fit()));
  field.addEventListener("keydown", press);
  form.addEventListener("submit", (event) => (event.preventDefault(), written() ? stop() : submit()));
  two.addEventListener("click", () => two.setAttribute("aria-pressed", String(two.getAttribute("aria-pressed") !== "true")));
  on("change", show);
  on("opened", () => ((field.value = sessionStorage.getItem(key()) ?? ""), fit()));
  on("suggest", ({ detail }) => ((field.value = detail), fit(), field.focus()));
  show();
}

const key = () => `draft:${session.conversation?.id ?? "new"}`;

/** What is typed survives a reload and a look at another conversation. */
function keep() {
  if (field.value) sessionStorage.setItem(key(), field.value);
  else sessionStorage.removeItem(key());
}

function press(event) {
  if (event.isComposing || event.keyCode === 229) return; // Enter that ends a composition (IME) is no "send"
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    if (!written()) submit();
  }
  if (event.key === "ArrowUp" && !field.value) (event.preventDefault(), editLast());
}

async function submit() {
  const text = field.value.trim();
  if (!text) return field.focus();
  const compare = two.getAttribute("aria-pressed") === "true";
  field.value = "";
  keep();
  fit();
  two.setAttribute("aria-pressed", "false");
  const asked = await attempt(() => say(text, { compare }).then(() => true));
  if (asked || field.value || session.conversation?.messages.some((message) => message.content === text)) return undefined;
  field.value = text; // it did not arrive: nothing that was typed is lost
  keep();
  return fit();
}

/** Show send or stop. */
function show() {
  const busy = Boolean(written());
  button.replaceChildren(icon(busy ? "stop" : "send"));
  button.setAttribute("aria-label", busy ? "Stop" : "Send");
  button.title = busy ? "Stop (Esc)" : "Send (Enter)";
  form.classList.toggle("busy", busy);
}

function fit() {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 240)}px`;
  button.classList.toggle("ready", Boolean(field.value.trim()));
}
