// "Which is more you?": two answers side by side, while they are written and until one is chosen.
import { make, find } from "./dom.js";
import { render } from "./markdown.js";
import { attempt, choose, session, skip } from "./session.js";

const SIDES = [["left", "First answer", "1"], ["right", "Second answer", "2"]];

/** Two answers that are being written. */
export function pairWritten() {
  return make(
    "section",
    { class: "pair writing", "aria-label": "Two answers, being written" },
    make("h2", {}, "Two answers are on their way"),
    make("div", { class: "sides" }, SIDES.map(([, name]) => make("article", { class: "side", "aria-label": name }, heading(name), make("div", { class: "text" }), make("p", { class: "dots", role: "img", "aria-label": "Waiting" }, make("i"), make("i"), make("i"))))),
  );
}

/** Two answers to choose from: by button, or by 1, 2 and 0 while the focus is here. */
export function choosing(conversation, pair) {
  const decide = (choice) => attempt(async () => {
    await choose(pair, choice);
    find("#field").focus();
  });
  const sides = SIDES.map(([side, name, key]) => {
    const text = make("div", { class: "text" });
    render(text, conversation.messages.find((message) => message.id === pair[side]).content);
    return make("article", { class: "side", "aria-label": name }, heading(name), text, make("button", { type: "button", class: "primary", "data-act": side, onclick: () => decide(side) }, "More me", make("kbd", {}, key)));
  });
  const keys = { 1: "left", 2: "right", 0: "tie" };
  return make(
    "section",
    {
      class: "pair",
      "aria-labelledby": "which",
      "data-message": pair.id,
      onkeydown: (event) => keys[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey && (event.preventDefault(), decide(keys[event.key])),
    },
    make("h2", { id: "which", tabindex: "-1", "data-act": "which" }, "Which is more you?"),
    make("div", { class: "sides" }, sides),
    make("div", { class: "buttons" },
      make("button", { type: "button", class: "plain", "data-act": "tie", onclick: () => decide("tie") }, "About the same", make("kbd", {}, "0")),
      make("button", { type: "button", class: "plain", "data-act": "later", onclick: () => skip(pair) }, "Not now")),
  );
}

const heading = (name) => make("h3", {}, name);

/** Take the focus to a question that has just come up, unless somebody is writing. */
export function invite() {
  const writing = find("#field").value || document.querySelector("dialog[open], .editor");
  if (!writing && session.conversation) document.querySelector("#which")?.focus({ preventScroll: true });
}
