// Thumbs, and why: the thumb counts at once, reasons and words are added to it.
import { iconButton, make } from "./dom.js";
import { attempt, on, rate, written } from "./session.js";

const REASONS = {
  1: { helpful: "Helpful", correct: "Correct", good_style: "Good style", good_length: "Good length", other: "Other" },
  "-1": {
    too_long: "Too long", too_short: "Too short", wrong_style: "Not my style", incorrect: "Incorrect",
    did_not_follow_instructions: "Did not do what I asked", unhelpful: "Unhelpful", refused_unexpectedly: "Refused for no reason",
    stereotype_or_bias: "Stereotype or bias", vulgar_or_offensive: "Vulgar or offensive", sexual: "Sexual", other: "Other",
  },
};
let open = null; // id of the message whose reasons are asked for
let kept = Promise.resolve(); // what was said so far is stored
let draft = null; // words that are being typed there: the answer to a reason that was pressed draws the form anew

on("change", () => (open = written() ? null : open));
const begin = (id) => ([open, draft] = [id, null]);
export const asksWhy = (message) => open === message.id && Boolean(message.feedback);

/** The two thumbs of an answer; pressed again a thumb is taken back. */
export function thumbs(message) {
  const given = message.feedback?.rating;
  const thumb = (rating, name, label) =>
    iconButton(name, label, () => press(message, rating), { "aria-pressed": String(given === rating), "data-act": name, class: "quiet thumb" });
  return [thumb(1, "up", "Good answer"), thumb(-1, "down", "Bad answer")];
}

async function press(message, rating) {
  const again = message.feedback?.rating === rating;
  begin(again ? null : message.id);
  await attempt(() => rate(message, again ? null : { rating, reasons: [], comment: "" }));
  if (!again) document.querySelector(`[data-message="${message.id}"] .why button`)?.scrollIntoView({ block: "nearest" });
}

/** What else there is to say about a thumb. */
export function reasons(message) {
  const { rating, reasons: known, comment } = message.feedback;
  const picked = new Set(known);
  const words = make("input", { type: "text", maxlength: "500", placeholder: "In your own words (optional)", "aria-label": "Why, in your own words", "data-act": "why-words" });
  words.value = draft ?? comment;
  words.oninput = () => (draft = words.value);
  const keep = () => {
    const said = { rating, reasons: [...picked], comment: words.value.trim() };
    return (kept = kept.then(() => attempt(() => rate(message, said)))); // in order: an earlier one must not win
  };
  const toggle = (reason) => {
    if (!picked.delete(reason)) picked.add(reason);
    return keep();
  };
  const close = () => {
    const done = keep();
    begin(null);
    return done;
  };
  const chips = Object.entries(REASONS[rating]).map(([reason, name]) =>
    make("button", { type: "button", class: "chip", "aria-pressed": String(picked.has(reason)), "data-act": `why-${reason}`, onclick: () => toggle(reason) }, name));
  const form = { class: "why", "aria-label": "Why?", onsubmit: (event) => (event.preventDefault(), close()) };
  return make("form", form, make("p", {}, rating > 0 ? "Glad to hear. What was good?" : "What was wrong?"), make("div", { class: "chips" }, chips), make("div", { class: "words" }, words, make("button", { type: "submit", class: "plain" }, "Done")));
}
