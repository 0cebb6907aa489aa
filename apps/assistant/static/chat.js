// The conversation on show: questions, answers, what can be done with each, and the answer being written.
import { choosing, pairWritten } from "./compare.js";
import { find, icon, iconButton, make, toast } from "./dom.js";
import { draftAt, editedIn, keepDraft, placeOf } from "./drafts.js";
import { asksWhy, reasons, thumbs } from "./feedback.js";
import { render } from "./markdown.js";
import { answer, attempt, compare, correct, emit, on, pending, say, session, turnTo, written } from "./session.js";
import { branch, tip, verdict, versions } from "./tree.js";

const NEAR_PX = 120; // this close to the end the page follows the answer
const STARTERS = ["Tell me a short story about a fox.", "How can I fall asleep more easily?", "Give me three ideas for a rainy day."];
const log = find("#log");
const scroller = find("#scroll");
let editing = null; // id of the message that is being edited
let nodes = new Map(); // message id -> {node, signature}
let frame = null;
let opened = true; // a conversation that was just opened is shown from its end

export function start() {
  on("change", draw);
  on("opened", () => ((editing = (session.conversation && editedIn(session.conversation)?.id) ?? null), (nodes = new Map()), (opened = true)));
  on("token", ({ detail }) => detail === written() && (frame ??= requestAnimationFrame(drawWriting)));
  scroller.addEventListener("scroll", showWayDown, { passive: true });
  find("#bottom").addEventListener("click", toEnd);
  log.addEventListener("click", copyCode);
}

/** Edit the last question on show. */
export function editLast() {
  const last = session.conversation && branch(session.conversation).findLast((message) => message.role === "user");
  if (last && !written()) edit(last);
}

function draw() {
  const follow = opened || nearEnd();
  const place = focused();
  opened = false;
  const { conversation } = session;
  const run = written();
  const shown = conversation ? branch(conversation) : [];
  if (run) while (shown.length && shown.at(-1).id !== run.question) shown.pop();
  const pair = pending();
  const kept = new Map();
  /** What was drawn before stays where nothing changed: it keeps focus and selection, and is not announced again. */
  const keep = (id, state, build) => {
    const signature = JSON.stringify(state);
    const old = nodes.get(id);
    const node = old?.signature === signature ? old.node : build();
    kept.set(id, { node, signature });
    return node;
  };
  const list = shown.map((message) => {
    if (pair && [pair.left, pair.right].includes(message.id)) return keep(pair.id, pair, () => choosing(conversation, pair));
    const state = editing === message.id || [message, versions(conversation, message).length, verdict(conversation, message), asksWhy(message), Boolean(run)];
    return keep(message.id, state, () => turn(message));
  });
  const last = shown.at(-1);
  if (run) list.push(run.compare ? pairWritten(run) : writing());
  else if (last?.role === "user") list.push(keep(`under ${last.id}`, problemOf(last), () => unanswered(last)));
  nodes = kept;
  arrange(list.length ? list : [welcome()]);
  log.setAttribute("aria-busy", String(Boolean(run)));
  find("#title").textContent = conversation?.title || "New conversation";
  document.title = conversation?.title ? `${conversation.title} · edgealign` : "edgealign";
  if (run) drawWriting();
  if (place) refocus(place);
  if (follow) toEnd();
  showWayDown();
}

/** Put these nodes on show. Those that are there already are not touched: they keep focus and selection. */
function arrange(list) {
  list.forEach((node, at) => log.children[at] !== node && log.insertBefore(node, log.children[at] ?? null));
  while (log.children.length > list.length) log.lastChild.remove();
}

function turn(message) {
  const mine = message.role === "user";
  if (editing === message.id) return editor(message);
  const body = make("div", { class: "text" });
  render(body, message.content);
  return make(
    "article",
    { class: mine ? "turn question" : "turn answer", "data-message": message.id },
    make("h2", { class: "unseen" }, mine ? "You said" : "Answer"),
    body,
    notes(message),
    make("div", { class: "actions" }, mine ? questionActions(message) : answerActions(message)),
  );
}

function questionActions(message) {
  return [switcher(message), copy(message), iconButton("edit", "Edit question", () => edit(message), { "data-act": "edit", disabled: Boolean(written()) })];
}

function answerActions(message) {
  const busy = Boolean(written());
  const others = versions(session.conversation, message);
  const act = (work) => () => attempt(work);
  const again = act(() => answer(message.conversation, message.parent));
  return [
    switcher(message),
    ...thumbs(message),
    copy(message),
    iconButton("edit", "Edit answer: your version is preferred", () => edit(message), { "data-act": "edit", disabled: busy }),
    iconButton("again", "Another answer", again, { "data-act": "again", disabled: busy }),
    others.length > 1 && iconButton("two", "Compare with the other version", act(() => comparison(message, others)), { "data-act": "two", disabled: busy }),
    facts(message),
    asksWhy(message) && reasons(message),
  ];
}

/** This version beside the one before it (the first: beside the one after it). */
async function comparison(message, others) {
  const at = others.indexOf(message);
  const [left, right] = at ? [others[at - 1], message] : [message, others[1]];
  await compare(left.id, right.id);
}

/** What made this answer, for who wants to know. */
function facts({ facts: { model, adapter, taste, tokens, seconds, edited_from: edited, sampling } }) {
  if (!model) return null;
  const rate = tokens && seconds ? `${(tokens / seconds).toPrecision(2)} tokens/s` : "";
  const title = edited ? "Written by you" : [`${tokens} tokens`, rate, `seed ${sampling?.seed}`, adapter ? `adapter ${adapter.slice(0, 8)}` : taste ? tasted(taste) : "no adapter"].filter(Boolean).join(" · ");
  return make("span", { class: "facts", title }, edited ? "your version" : [model, rate].filter(Boolean).join(" · "));
}

/** How far a user's own version was followed. */
const tasted = ({ asking, version, strength, kl_nats: paid }) => [asking ? "asking for your taste" : `your version ${version}`, paid === undefined ? "" : `strength ${strength}, ${paid} nats/token`].filter(Boolean).join(", ");

function notes(message) {
  const { finish, dropped } = message.facts;
  const said = [
    { edit: "Preferred: your own words.", chosen: "You chose this one." }[verdict(session.conversation, message)],
    finish === "length" && "It ends here because of the length limit in the settings, or because the context is full.",
    finish === "cancelled" && "Stopped.",
    dropped > 0 && `The conversation has outgrown the context: ${dropped} earlier ${dropped === 1 ? "turn was" : "turns were"} left out.`,
  ].filter(Boolean);
  return said.map((text) => make("p", { class: "note" }, text));
}

function switcher(message) {
  const all = versions(session.conversation, message);
  const at = all.indexOf(message);
  if (all.length < 2) return null;
  const go = (step) => attempt(() => turnTo(tip(session.conversation, all[at + step])));
  const busy = Boolean(written());
  return make(
    "span",
    { class: "versions", role: "group", "aria-label": "Versions" },
    iconButton("left", "Earlier version", () => go(-1), { disabled: busy || at === 0, "data-act": "left" }),
    make("span", { class: "count" }, `${at + 1} of ${all.length}`),
    iconButton("right", "Later version", () => go(1), { disabled: busy || at === all.length - 1, "data-act": "right" }),
  );
}

const copy = (message) => iconButton("copy", "Copy", ({ currentTarget }) => copyText(currentTarget, message.content), { "data-act": "copy" });

async function copyText(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    return toast("The browser does not allow copying here.");
  }
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  return toast("Copied.");
}

function copyCode(event) {
  const button = event.target.closest("[data-copy]");
  if (button) copyText(button, button.closest(".code").querySelector("code").textContent);
}

function edit(message) {
  editing = message.id;
  draw();
  const field = log.querySelector(".editor textarea");
  field?.focus();
  field?.setSelectionRange(field.value.length, field.value.length);
}

function editor(message) {
  const mine = message.role === "user";
  const place = placeOf(session.conversation, message);
  const field = make("textarea", { rows: Math.min(16, message.content.split("\n").length + 2), "aria-label": mine ? "The question in other words" : "The answer as it should have been", "data-act": "words" });
  field.value = draftAt(place) ?? message.content;
  const end = () => {
    keepDraft(place, null);
    if (editing === message.id) editing = null;
  };
  const close = () => {
    end();
    draw();
    log.querySelector(`[data-message="${message.id}"] [data-act=edit]`)?.focus();
  };
  const save = async () => {
    const content = field.value.trim();
    if (!content || content === message.content.trim()) return close();
    keeper.disabled = true; // what was typed stays until it is stored
    await attempt(() => (mine ? say(content, { parent: message.parent, stored: end }) : correct(message, content, { stored: end })));
    keeper.disabled = false;
    return undefined;
  };
  const keeper = make("button", { type: "button", class: "primary", onclick: save }, mine ? "Ask again" : "Save");
  field.addEventListener("input", () => keepDraft(place, field.value));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") (event.stopPropagation(), close());
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (event.preventDefault(), keeper.disabled || save());
  });
  return make(
    "article",
    { class: `turn editor ${mine ? "question" : "answer"}`, "data-message": message.id },
    make("h2", { class: "unseen" }, mine ? "Edit your question" : "Edit the answer"),
    field,
    make("div", { class: "buttons" },
      make("span", { class: "hint" }, mine ? "The earlier version stays." : "Your version is learned from, the earlier one stays."),
      make("button", { type: "button", class: "plain", onclick: close }, "Cancel"),
      keeper),
  );
}

function writing() {
  return make("article", { class: "turn answer writing" }, make("h2", { class: "unseen" }, "Answer, being written"), make("div", { class: "text" }), dots());
}

const dots = () => make("p", { class: "dots", role: "img", "aria-label": "Thinking" }, make("i"), make("i"), make("i"));

function drawWriting() {
  frame = null;
  const run = written();
  if (!run) return;
  const follow = nearEnd();
  const parts = [...log.querySelectorAll(".writing .text")];
  parts.forEach((part, at) => render(part, at ? run.texts.right : run.texts.left));
  log.querySelectorAll(".writing .dots").forEach((mark, at) => (mark.hidden = Boolean(at ? run.texts.right : run.texts.left)));
  if (follow) toEnd();
}

/** Why a question has no answer, as far as it is known. */
function problemOf(question) {
  const { error, text } = session.failed.get(question.id) ?? {};
  return [error?.message, error?.retry_s, error?.status, text];
}

/** A question without an answer: the last try failed, or was stopped before its first word. */
function unanswered(question) {
  const failed = session.failed.get(question.id);
  const partial = failed?.text && make("div", { class: "text" });
  if (partial) render(partial, failed.text);
  const wait = failed?.error.retry_s ? ` Try again in about ${failed.error.retry_s} s.` : "";
  const full = failed?.error.status === 400 ? " Begin a new conversation, or make the question shorter." : "";
  return make(
    "article",
    { class: "turn answer" },
    make("h2", { class: "unseen" }, "No answer yet"),
    partial,
    make("div", { class: failed ? "problem" : "problem calm", role: failed ? "alert" : null },
      make("p", {}, failed ? failed.error.message + wait + full : "This question has no answer yet."),
      make("button", { type: "button", class: "plain", "data-act": "retry", onclick: () => attempt(() => answer(question.conversation, question.id)) }, failed ? "Try again" : "Answer it")),
  );
}

function welcome() {
  const choose = (text) => () => emit("suggest", text);
  return make(
    "div",
    { class: "welcome" },
    make("h2", {}, "What would you like to talk about?"),
    make("p", {}, "Everything stays on this machine. Your choices and edits teach the assistant your taste; so do a thumb up and a thumb down on two answers to one question."),
    make("div", { class: "starters" }, STARTERS.map((text) => make("button", { type: "button", onclick: choose(text) }, text))),
  );
}

const nearEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_PX;
const toEnd = () => (scroller.scrollTop = scroller.scrollHeight);
const showWayDown = () => (find("#bottom").hidden = nearEnd());

function focused() {
  const act = document.activeElement?.dataset?.act;
  const message = document.activeElement?.closest("[data-message]")?.dataset.message;
  return act && message ? `[data-message="${message}"] [data-act="${act}"]` : null;
}

const refocus = (place) => document.activeElement === document.body && log.querySelector(place)?.focus();
