// What the page knows, and everything that changes it: the conversation on show, answers being written, settings.
// Views listen for "change" (anything), "token" (an answer grew), "history" (the list of conversations), "opened"
// (another conversation), "state" (settings, models), "model" (which one answers), "taught" (a choice was made).
import { announce, toast } from "./dom.js";
import { ApiError, call, stream } from "./api.js";
import { dropDrafts, dropDraftsOf } from "./drafts.js";
import { branch, tip, versions, waiting } from "./tree.js";

export const events = new EventTarget();
export const session = {
  info: null, // GET /api/state
  conversation: null, // with all its messages; null: a new one
  writing: new Map(), // conversation id -> the answer that is being written
  failed: new Map(), // question id -> {error, text} of the last try
  skipped: new Set(), // comparisons that shall not ask again
  asking: false, // a question is on its way to be stored
  asked: null, // the comparison that a button asked for, of whichever answer
};
const STORING_MS = 10_000; // how long a stopped answer may take to be stored
const others = new BroadcastChannel("edgealign"); // the same page in other tabs

export const emit = (name, detail) => events.dispatchEvent(new CustomEvent(name, { detail }));
export const on = (name, listener) => events.addEventListener(name, listener);
export const settings = () => session.info.settings;
export const written = () => session.writing.get(session.conversation?.id);

/** Who is speaking: whose conversation is on show, or whose the next one will be. */
export const speaker = () => session.conversation?.user ?? settings().user;

/** The model that this user chose in this browser; null: automatic, which is their own version where there is one. */
export function chosenModel(user = speaker()) {
  const known = localStorage.getItem(`model:${user}`);
  return session.info.models.includes(known) ? known : null;
}

export function chooseModel(name, user = speaker()) {
  if (name) localStorage.setItem(`model:${user}`, name);
  else localStorage.removeItem(`model:${user}`);
  emit("model");
}

/** Whether no question can be asked here just now: one is on its way, or being answered. */
export const busy = () => session.asking || Boolean(written());

/** Tell the views, and the other tabs, that something is different; `gone`: a conversation, `forgotten`: a user. */
export function changed(id = session.conversation?.id, { gone, forgotten } = {}) {
  emit("change");
  tidy({ id, gone, forgotten });
  others.postMessage({ id, gone, forgotten });
}

function tidy({ gone, forgotten }) {
  if (gone) dropDrafts(gone);
  if (forgotten) dropDraftsOf(forgotten);
  emit("history");
}

others.onmessage = async ({ data }) => {
  tidy(data);
  if (data.id === "settings" || data.id === null) await loadState();
  if (!data.id || data.id !== session.conversation?.id || written()) return;
  await reload().catch((error) => error.status === 404 && show(null)); // deleted over there
};

/** Run what a button asks for; what goes wrong is said. */
export async function attempt(action) {
  try {
    return await action();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    toast(error.message);
    return undefined;
  }
}

export async function loadState() {
  session.info = await call("GET", "/api/state");
  emit("state");
}

let changing = Promise.resolve();

/** Until what was changed is in force: what is asked next shall see it. */
export const settled = () => changing.catch(() => {});

/** One change after another, in the order in which they were made: of two under way at once, either could count. */
export const inTurn = (change) => (changing = settled().then(change));

export const changeSettings = (values) => inTurn(async () => {
  await call("PUT", "/api/settings", values);
  await loadState();
  others.postMessage({ id: "settings" });
});

let wanted = 0; // counts what was to be shown: only the last of several quick wishes is
let opening = Promise.resolve();

/** Show a conversation, or a new one. */
export const show = (id) => (opening = fetched(id));

async function fetched(id) {
  const mine = ++wanted;
  if (id && id === session.conversation?.id) return;
  let found = null;
  try {
    if (id) found = await call("GET", `/api/conversations/${id}`);
  } catch (error) {
    if (mine === wanted) throw error;
  }
  if (mine !== wanted) return;
  session.conversation = found;
  emit("opened");
  emit("change");
}

export async function reload(id = session.conversation?.id) {
  const found = await call("GET", `/api/conversations/${id}`);
  if (session.conversation?.id === id) session.conversation = found;
  emit("change");
}

/**
 * Ask: a question under the end of the branch, or `parent`'s branch when an earlier question is asked in other words.
 * `stored` is called when the question is kept; the promise ends with the answer.
 */
export async function say(content, { parent, compare = false, stored = () => {} } = {}) {
  if (busy()) return toast("Another question is being answered: wait, or stop it.");
  session.asking = true;
  let conversation, question;
  try {
    await opening.catch(() => {}); // a question belongs to what is being opened, and not to what was there before
    conversation = session.conversation;
    const here = wanted;
    await settled();
    if (!conversation) {
      conversation = await call("POST", "/api/conversations", {});
      if (here === wanted) enter(conversation);
    }
    if (session.conversation?.id === conversation.id) conversation = session.conversation; // as it is by now
    const above = parent === undefined ? answerOnShow(conversation) : parent;
    question = await call("POST", `/api/conversations/${conversation.id}/messages`, { content, parent: above });
    stored();
    await reload(conversation.id);
  } finally {
    session.asking = false;
  }
  changed(conversation.id);
  return answer(conversation.id, question.id, { compare: compare || dueForChoice(), user: conversation.user });
}

/** A conversation that was just made is on show. */
function enter(conversation) {
  session.conversation = conversation;
  emit("created");
  emit("opened");
}

function answerOnShow(conversation) {
  const last = branch(conversation).at(-1);
  return last?.role === "user" ? last.parent : (last?.id ?? null);
}

/** Whether this answer is the nth since the last choice, as the settings want it. */
function dueForChoice() {
  const every = settings().compare_every;
  const count = (Number(localStorage.getItem("answers")) || 0) + 1;
  localStorage.setItem("answers", every && count >= every ? 0 : count);
  return every > 0 && count >= every;
}

/** Have a question answered, once or by two answers to choose from. Again: another version. */
export async function answer(id, question, { compare = false, user = speaker() } = {}) {
  if (session.writing.has(id)) return;
  const run = { question, compare, user, model: chosenModel(user), texts: { left: "", right: "" }, message: null, abort: new AbortController() };
  session.writing.set(id, run);
  session.failed.delete(question);
  emit("change");
  try {
    await write(run, question);
  } catch (error) {
    if (error.name === "AbortError") await stored(id, run);
    else if (error instanceof ApiError) session.failed.set(question, { error, text: run.texts.left });
    else throw error;
  } finally {
    session.writing.delete(id);
    await reload(id).catch(() => emit("change"));
    changed(id);
  }
}

async function write(run, question) {
  const { compare: two, model, user } = run;
  const path = `/api/messages/${question}/${two ? "comparisons" : "answers"}`;
  const asks = model === `${session.info.model}@${user}`; // of their own version the server draws two that teach most
  const form = !model || (two && asks) ? {} : two ? { models: [model, model] } : { model };
  for await (const event of stream(path, form, run.abort.signal)) {
    const side = event.side ?? "left";
    if (event.type === "start") run.message = event.message;
    else if (event.type === "again") run.texts[side] = "";
    else if (event.type === "token") run.texts[side] += event.text;
    else if (event.type === "answer") {
      if (two) toast("There are no two different answers to this. Here is the one.");
      announce(`Answer: ${event.message.content}`);
    } else if (event.type === "comparison") announce("Two answers are there. Which is more you?");
    emit("token", run);
  }
}

/** Wait until the server has stored what was said before it was stopped. */
async function stored(id, run) {
  announce("Stopped.");
  if (!run.texts.left || run.compare) return;
  for (const end_ms = Date.now() + STORING_MS; Date.now() < end_ms; ) {
    const found = await call("GET", `/api/conversations/${id}`).catch(() => null);
    if (!found || found.messages.some((message) => message.id === run.message)) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

export function stop() {
  written()?.abort.abort();
}

/** The comparison to show in place of an answer: one that was asked for, or else the last answer's, unless put off. */
export function pending() {
  const { conversation } = session;
  if (!conversation || written()) return null;
  const shown = new Set(branch(conversation).map(({ id }) => id));
  const asked = conversation.comparisons.find(({ id, choice }) => id === session.asked && choice === null);
  const pair = asked && (shown.has(asked.left) || shown.has(asked.right)) ? asked : waiting(conversation);
  return pair && !session.skipped.has(pair.id) ? pair : null;
}

export async function choose(pair, choice) {
  const { id, head, user } = session.conversation;
  const { learned } = await call("PUT", `/api/comparisons/${pair.id}/choice`, { choice });
  if (head === pair.left || head === pair.right) await reload(id);
  else {
    // An earlier answer: the server ends the branch at the chosen one, and what was said below it shall stay on show.
    const found = await call("GET", `/api/conversations/${id}`);
    const chosen = found.messages.find((message) => message.id === pair[choice]);
    await showBranch(id, chosen ? tip(found, chosen).id : head);
  }
  changed(id);
  emit("taught", { user, learned });
}

export function skip(pair) {
  session.skipped.add(pair.id);
  emit("change");
}

/** Put two answers that are there already side by side. */
export async function compare(left, right) {
  const { id } = session.conversation;
  session.asked = (await call("POST", "/api/comparisons", { left, right })).id;
  await reload(id);
}

/** Another branch. */
export async function turnTo(message) {
  await showBranch(message.conversation, message.id);
  changed(message.conversation);
}

async function showBranch(id, head) {
  const found = await call("PATCH", `/api/conversations/${id}`, { head });
  if (session.conversation?.id === id) session.conversation = found;
}

/** A thumb, or none any more. Beside the other thumb on another answer to the question it makes a choice, or unmakes it. */
export async function rate(message, feedback) {
  const { rating } = message.feedback ?? {};
  const facing = versions(session.conversation, message).some((other) => other.feedback?.rating === -(feedback?.rating ?? rating));
  const user = speaker();
  const path = `/api/messages/${message.id}/feedback`;
  const found = feedback ? await call("PUT", path, feedback) : await call("DELETE", path);
  message.feedback = found.feedback;
  changed();
  if (facing && feedback?.rating !== rating) emit("taught", { user, learned: found.learned });
}

/** The answer as it should have been: a preference for the edit. */
export async function correct(message, content, { stored }) {
  const id = message.conversation;
  const user = speaker();
  const { learned } = await call("POST", `/api/messages/${message.id}/edit`, { content });
  stored();
  await reload(id);
  changed(id);
  emit("taught", { user, learned });
}
