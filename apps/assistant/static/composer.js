// Where questions are written: it grows with its text, keeps drafts, and never sends half of a composed character.
import { find, icon } from "./dom.js";
import { draftAt, keepDraft, placeOf } from "./drafts.js";
import { attempt, busy, on, say, session, stop, written } from "./session.js";
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
  on("created", () => {
    keepDraft(here(), draftAt(placeOf(null))); // the next question may have been begun meanwhile
    keepDraft(placeOf(null), null);
  });
  on("opened", () => ((field.value = draftAt(here()) ?? ""), fit()));
  on("suggest", ({ detail }) => ((field.value = detail), fit(), field.focus()));
  show();
}

const here = () => placeOf(session.conversation);

/** What is typed survives a reload and a look at another conversation. */
const keep = () => keepDraft(here(), field.value || null);

function press(event) {
  if (event.isComposing || event.keyCode === 229) return; // Enter that ends a composition (IME) is no "send"
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  }
  if (event.key === "ArrowUp" && !field.value) (event.preventDefault(), editLast());
}

async function submit() {
  const text = field.value.trim();
  if (!text) return field.focus();
  if (busy()) return undefined;
  const before = session.conversation;
  let stored = false;
  const compare = two.getAttribute("aria-pressed") === "true";
  field.value = "";
  keep();
  fit();
  two.setAttribute("aria-pressed", "false");
  await attempt(() => say(text, { compare, stored: () => (stored = true) }));
  if (stored) return undefined;
  const with_ = (later) => [text, later].filter(Boolean).join("\n\n"); // nothing that was typed is lost
  const now = session.conversation;
  if (now?.id !== before?.id && (before || now?.messages.length)) return keepDraft(placeOf(before), with_(draftAt(placeOf(before))));
  field.value = with_(field.value);
  two.setAttribute("aria-pressed", String(compare));
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
