// "Your taste": what is known of it, counted from the choices themselves, and what can be done with them.
import { call, text } from "./api.js";
import { ask, find, make, offer, openDialog, toast } from "./dom.js";
import * as learned from "./learned.js";
import { attempt, changed, chooseModel, loadState, session, settings, settled, show } from "./session.js";

const FEW = 4; // choices below which nothing is said about them
const dialog = find("#taste");

export function start() {
  find("#choices").addEventListener("click", () => attempt(download));
  find("#forget").addEventListener("click", () => attempt(forget));
  learned.start();
}

export async function open() {
  if (!session.info) return;
  await settled();
  const { user } = settings();
  find("#taste-of").textContent = user === "me" ? "Your taste" : `Your taste, ${user}`;
  const [pairs, rated] = await Promise.all([rows("pair"), rows("thumb"), learned.load()]);
  const good = rated.filter((row) => row.label).length;
  find("#counts").replaceChildren(
    count(pairs.length, "choice", "between two answers, by an edit, or by two opposite thumbs"),
    count(good, "thumb up", "", "thumbs up"),
    count(rated.length - good, "thumb down", "", "thumbs down"),
  );
  find("#leanings").replaceChildren(...leanings(pairs).map((line) => make("li", {}, line)));
  find("#recent").replaceChildren(...pairs.slice(-5).reverse().map(example));
  find("#examples").hidden = !pairs.length;
  find("#choices").disabled = !pairs.length;
  openDialog(dialog);
}

async function rows(form) {
  const lines = await text(`/api/choices?${new URLSearchParams({ user: settings().user, form })}`);
  return lines.split("\n").filter(Boolean).map((line) => JSON.parse(line));
}

const count = (number, one, note, many = `${one}s`) => make("div", {}, make("strong", {}, String(number)), make("span", {}, number === 1 ? one : many), note && make("small", {}, note));

/** Plain counts over the choices, in words. Nothing is guessed: below a few choices, nothing is said. */
export function leanings(pairs) {
  if (pairs.length < FEW) return [`After ${FEW} choices this says what they have in common.`];
  const measures = [
    [(answer) => answer.length, "the longer answer", "the shorter answer"],
    [(answer) => (answer.match(/^ {0,3}(?:[-*+]|\d+[.)]) /gm) ?? []).length, "more points in a list", "fewer lists"],
    [(answer) => (answer.match(/[!\u{1F300}-\u{1FAFF}]/gu) ?? []).length, "the livelier tone (!, emoji)", "the calmer tone (fewer !, emoji)"],
    [(answer) => (answer.match(/\?/g) ?? []).length, "the one that asks back", "the one that does not ask back"],
  ];
  return measures.flatMap(([measure, more, less]) => {
    const signs = pairs.map(({ chosen, rejected }) => Math.sign(measure(chosen) - measure(rejected))).filter(Boolean);
    const up = signs.filter((sign) => sign > 0).length;
    if (signs.length < FEW) return [];
    return [`You took ${up * 2 >= signs.length ? more : less} in ${Math.max(up, signs.length - up)} of the ${signs.length} choices where it made a difference.`];
  });
}

function example({ prompt, chosen, rejected }) {
  const asked = prompt.findLast((turn) => turn.role === "user").content;
  return make("li", {}, make("p", { class: "asked" }, asked), make("p", {}, make("span", { class: "tag" }, "preferred"), ` ${chosen}`), make("p", { class: "passed" }, make("span", { class: "tag" }, "passed over"), ` ${rejected}`));
}

async function download() {
  const { user } = settings();
  offer(`${user.replace(/[^\p{L}\p{N}]+/gu, "-")}-choices.jsonl`, await text(`/api/choices?${new URLSearchParams({ user })}`), "application/jsonl");
}

async function forget() {
  const { user } = settings();
  const warning = `Every conversation, thumb and choice of “${user}” is removed from this machine, and what was learned from them. This cannot be undone.`;
  if (!(await ask({ title: "Forget everything?", text: warning, yes: "Forget me", danger: true }))) return;
  const { conversations } = await call("DELETE", `/api/users/${encodeURIComponent(user)}`);
  chooseModel(null, user);
  dialog.close();
  location.hash = "";
  await loadState();
  await show(null);
  changed(null, { forgotten: user });
  toast(`Forgotten: ${conversations} ${conversations === 1 ? "conversation" : "conversations"}.`);
}
