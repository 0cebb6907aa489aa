// What was learned of a user, in the panel "Your taste": words, how well choices are foreseen, strength, versions, LoRA.
import { call } from "./api.js";
import { find, make, toast } from "./dom.js";
import { attempt, chosenModel, inTurn, loadState, on, session, settings } from "./session.js";
import { tasteOf, watch } from "./watch.js";

const SVG = "http://www.w3.org/2000/svg";
const SHOWN = 8; // versions in the picture
let known = null; // GET /api/taste
let drawn = ""; // the versions on show: a look that finds nothing new leaves them, and the focus in them, alone
let unanswered = 0; // changes that the server has not answered yet; until then nothing else is shown

export function start() {
  const slider = find("#strength");
  slider.addEventListener("input", () => tell(Number(slider.value)));
  slider.addEventListener("change", () => attempt(() => change("PUT", "/strength", { strength: Number(slider.value) })));
  find("#train").addEventListener("click", () => attempt(() => change("POST", "/training")));
  find("#stop-training").addEventListener("click", () => attempt(() => change("DELETE", "/training")));
  on("taste", ({ detail }) => find("#taste").open && detail.user === settings().user && !unanswered && draw(detail));
}

export async function load() {
  draw(await call("GET", tasteOf(settings().user)));
}

function change(method, rest, body) {
  unanswered += 1;
  const path = tasteOf(settings().user, rest);
  return inTurn(async () => {
    try {
      known = await call(method, path, body).finally(() => (unanswered -= 1));
      await loadState(); // which models there are
    } finally {
      if (!unanswered) draw(known); // of what was refused: how it still is
    }
  });
}

function draw(taste) {
  known = taste;
  watch(taste.user, taste);
  const { active, versions, words, fault } = taste;
  find("#words").textContent = capital(words);
  find("#adapter").textContent = standing(taste);
  find("#decision").textContent = sentence(taste.decision ?? "");
  find("#decision").hidden = !taste.decision;
  find("#taste-fault").textContent = fault;
  find("#taste-fault").hidden = !fault;
  find("#foreseen").hidden = !versions.length;
  const slider = find("#strength");
  slider.max = taste.max_strength;
  slider.value = taste.strength;
  find("#strength-row").hidden = !active;
  find("#help-strength").textContent = isLora(taste)
    ? "A LoRA has no degrees: 0 is off, anything else is on."
    : "How far your answers follow your taste. 0 is off; at the far end answers begin to lose the thread.";
  tell(taste.strength);
  find("#taste-history").hidden = !versions.length;
  if (drawn !== (drawn = JSON.stringify([taste.user, active, versions]))) {
    find("#foreseen").replaceChildren(...(versions.length ? picture(taste) : []));
    find("#taste-versions").replaceChildren(...[...versions].reverse().map(version), everybody(active));
  }
  training(taste);
}

const isLora = ({ versions, active }) => versions.some(({ version: number, method }) => number === active && method !== "lore");

/** What there is, and what answers just now. */
function standing({ user, ready, why_not, choices, active, versions, simulated, strength }) {
  const { model: base, models } = session.info;
  const own = `${base}@${user}`;
  const chosen = chosenModel(user);
  if (active || models.includes(own)) {
    const is = active && !strength ? "At strength 0 it changes nothing." : "It answers your conversations.";
    const other = `It does not answer now: ${chosen} was chosen under “Answering”.`;
    return `You have a version of your own: ${own}. ${chosen && chosen !== own ? other : is}`;
  }
  const answering = chosen && chosen !== base ? `${chosen} answers: it was chosen under “Answering”.` : `${base} answers as it does for everybody.`;
  const now = `${versions.length ? "No version of your own is in use" : "There is no version of your own yet"}: ${answering}`;
  if (!ready) return `${now} ${sentence(why_not)}`;
  const where = simulated ? " What people may differ in was learned from simulated users." : "";
  return `${now} ${choices ? "" : "Choose between two answers, and it begins."}${where}`;
}

/** How well each version foresees the user's choices, beside the model as it is for everybody. */
function picture({ versions, active }) {
  const rows = versions.filter(({ score }) => score !== null).slice(-SHOWN).map(measured);
  if (!rows.length) return [];
  const [high, gap, wide] = [72, 34, 11];
  const svg = shape("svg", { viewBox: `0 0 ${gap * SHOWN + 4} ${high + 18}`, role: "img", "aria-labelledby": "foreseen-said" });
  svg.append(shape("line", { class: "coin", x1: 0, x2: gap * SHOWN + 4, y1: high / 2, y2: high / 2 }));
  rows.forEach(({ number, before, after }, index) => {
    const left = 4 + index * gap;
    for (const [value, kind, at] of [[before, "everybody", left], [after, "own", left + wide + 1]]) {
      svg.append(shape("rect", { class: kind, x: at, y: high * (1 - value), width: wide, height: Math.max(1, high * value), rx: 2 }));
    }
    const label = shape("text", { x: left + wide, y: high + 13, class: number === active ? "now" : "" });
    label.textContent = number;
    svg.append(label);
  });
  const shown = rows.find(({ number }) => number === active) ?? rows.at(-1);
  return [svg, make("figcaption", { id: "foreseen-said" }, said(shown))];
}

/** A version's score as a share: for numbers, how surely a choice is foreseen from the others; for a LoRA, how often. */
function measured({ version: number, method, score, population }) {
  const lora = method !== "lore";
  const share = (value) => Math.min(1, Math.max(0, lora ? value : Math.exp(-value)));
  return { number, lora, before: share(population), after: share(score) };
}

function said({ number, lora, before, after }) {
  const [was, is] = [before, after].map((value) => `${Math.round(100 * value)} %`);
  return lora
    ? `Version ${number} ranks ${is} of the choices that were held out as you did; the model as it is for everybody ${was}.`
    : `Version ${number} foresees a choice, from your others, with ${is} on average; without it ${was}. A coin has 50 %.`;
}

function version({ version: number, method, choices, words, active, made_s }) {
  const what = [method === "lore" ? "" : "LoRA", `${choices} ${choices === 1 ? "choice" : "choices"}`, words || "as everybody"].filter(Boolean).join(" · ");
  return entry(number, `Version ${number}`, what, active, new Date(made_s * 1000).toLocaleString("en"));
}

const everybody = (active) => entry(0, "Everybody's", "the model as it comes", active === 0);

function entry(number, name, what, active, title = "") {
  const use = () => attempt(async () => {
    await change("POST", "/active", { version: number });
    toast(number ? `Version ${number} answers now.` : "Answers are everybody's now.");
    find(`#taste-versions [data-version="${number}"]`)?.focus();
  });
  const mark = active
    ? make("span", { class: "tag", tabindex: "-1", "data-version": number }, "in use")
    : make("button", { type: "button", class: "plain", "data-version": number, "aria-label": `Use ${name.toLowerCase()}`, onclick: use }, "Use");
  return make("li", { title }, make("span", {}, make("strong", {}, name), make("small", {}, what)), mark);
}

function training({ ready, trainable, training: { state, progress, message }, choices }) {
  find("#training").hidden = !ready && Boolean(trainable);
  const running = state === "running";
  find("#training-note").textContent = sentence(trainable) || message || `A deeper version, trained in the background. It is used only if it ranks more held-out choices as you did. From 4 choices on; you have made ${choices}.`;
  find("#training-progress").hidden = !running;
  find("#training-progress").value = progress;
  find("#train").hidden = running;
  find("#train").disabled = Boolean(trainable);
  find("#stop-training").hidden = !running;
}

const capital = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);
const sentence = (text) => text && `${capital(text)}.`;

/** The strength in words: beside the slider, and for who hears it. */
function tell(value) {
  const text = !value ? "off" : isLora(known) ? "on" : String(value);
  find("#strength").nextElementSibling.textContent = text;
  find("#strength").setAttribute("aria-valuetext", value === known.usual_strength && text !== "on" ? `${text}, the usual` : text);
}

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
