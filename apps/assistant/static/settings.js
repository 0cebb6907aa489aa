// Settings, each with what it does; they count at once. Who is speaking, which model answers, light or dark.
import { ask, find, make, openDialog, toast } from "./dom.js";
import { call } from "./api.js";
import { exportJson, importJson } from "./history.js";
import { attempt, changeSettings, chooseModel, chosenModel, emit, on, session, settings, show, speaker } from "./session.js";

const FIELDS = [
  ["temperature", "Liveliness", "How freely words are drawn (temperature). 0 always takes the likeliest word; above 1 answers become surprising.", { type: "range", min: 0, max: 2, step: 0.05 }],
  ["top_p", "Choice of words", "Draw only from the likeliest words that together reach this probability (top p). 1 allows all.", { type: "range", min: 0.05, max: 1, step: 0.05 }],
  ["min_p", "Cut-off", "Leave out words that are this much less likely than the likeliest (min p). 0 leaves out none.", { type: "range", min: 0, max: 0.5, step: 0.01 }],
  ["top_k", "Shortlist", "Draw only from this many of the likeliest words (top k). 0 means all.", { type: "number", min: 0, max: 1000000, step: 1 }],
  ["repetition_penalty", "Against repetition", "Above 1, words that were said already become less likely.", { type: "range", min: 1, max: 2, step: 0.05 }],
  ["max_tokens", "Longest answer", "In tokens, about three quarters of a word each.", { type: "number", min: 1, max: 100000, step: 1 }],
  ["compare_every", "Ask which is more me", "Every how many answers you are shown two and asked to choose. 0 never asks.", { type: "number", min: 0, max: 1000, step: 1 }],
];
const NEW = "\u0000new";
const dialog = find("#settings");

export function start() {
  const rows = FIELDS.map(([name, label, help, kind]) => row(name, label, help, make("input", { id: `set-${name}`, name, ...kind })));
  find("#fields").append(...rows);
  dialog.addEventListener("change", ({ target }) => target.name && attempt(() => save(target)));
  dialog.addEventListener("input", ({ target }) => target.type === "range" && tell(target));
  find("#defaults").addEventListener("click", () => attempt(reset));
  find("#export").addEventListener("click", () => attempt(() => exportJson()));
  find("#import").addEventListener("click", () => find("#file").click());
  find("#file").addEventListener("change", ({ target }) => attempt(() => importJson(target.files[0])).finally(() => (target.value = "")));
  find("#user").addEventListener("change", ({ target }) => attempt(() => speak(target.value)));
  find("#model").addEventListener("change", ({ target }) => chooseModel(target.value));
  find("#automatic").addEventListener("click", () => (chooseModel(null), find("#field").focus()));
  find("#light").addEventListener("click", () => attempt(() => changeSettings({ theme: dark() ? "light" : "dark" })));
  on("state", draw);
  for (const name of ["model", "opened"]) on(name, models);
}

export function open() {
  if (!session.info) return; // the server has not answered yet
  fill();
  openDialog(dialog);
}

function row(name, label, help, input) {
  input.setAttribute("aria-describedby", `help-${name}`);
  const value = input.type === "range" && make("output", { for: input.id });
  return make("div", { class: "row" }, make("label", { for: input.id }, label), make("span", { class: "value" }, input, value), make("p", { id: `help-${name}` }, help));
}

const tell = (input) => (input.nextSibling.textContent = Number(input.value).toFixed(2).replace(/\.?0+$/, ""));

async function save({ name, value, type, validity, min, max }) {
  const number = type === "range" || type === "number";
  if (number && (value === "" || !validity.valid)) {
    fill();
    return toast(`It has to be a whole number from ${min} to ${max}.`);
  }
  return changeSettings({ [name]: number ? Number(value) : value });
}

async function reset() {
  await changeSettings(Object.fromEntries([...FIELDS.map(([name]) => [name, null]), ["system", null]]));
  fill();
  toast("Back to the defaults.");
}

const dark = () => {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

/** Show what is in force. Not while somebody is changing things: an answer on its way would undo the next change. */
function fill() {
  const known = settings();
  for (const input of dialog.querySelectorAll("[name]")) {
    if (input.type === "radio") input.checked = known[input.name] === input.value;
    else input.value = known[input.name];
    if (input.type === "range") tell(input);
  }
}

function draw() {
  const known = settings();
  if (known.theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = known.theme;
  localStorage.setItem("theme", known.theme);
  models();
  attempt(people);
  const { version, runtime, digest, context, model } = session.info;
  find("#about").textContent = `edgealign ${version} · ${model} by ${runtime}${digest ? ` · ${digest.slice(0, 12)}` : ""} · ${context.toLocaleString("en")} tokens of context`;
}

/** Which model answers; where it is not the usual one, that is said beside the question too. */
function models() {
  if (!session.info) return;
  const known = chosenModel();
  const { model: base, models: all } = session.info;
  const options = [["", "Automatic"], ...all.map((name) => [name, name === base ? `${base} (everybody's)` : name])];
  find("#model").replaceChildren(...options.map(([value, name]) => make("option", { value, selected: value === (known ?? "") }, name)));
  const user = speaker();
  find("#chosen").hidden = !known;
  find("#chosen span").textContent = known ? `${known}${known === base ? ", everybody's version," : ""} answers${user === "me" ? "" : ` ${user}`}: chosen under “Answering”.` : "";
}

/** Everybody who has an adapter or a conversation here. */
async function people() {
  const { users, settings: { user } } = session.info ?? { users: [], settings: {} };
  if (!user) return;
  const found = await call("GET", "/api/conversations?limit=1000");
  const names = [...new Set([user, ...users, ...found.map((entry) => entry.user)])].sort();
  const known = [...find("#user").options].map((option) => option.value);
  if (known.join("\n") !== [...names, NEW].join("\n")) {
    const options = names.map((name) => make("option", { value: name }, name));
    find("#user").replaceChildren(...options, make("option", { value: NEW }, "Somebody new…"));
  }
  find("#user").value = user;
}

async function speak(choice) {
  const user = choice === NEW ? await ask({ title: "Who is speaking?", text: "Everybody has their own conversations and their own taste.", field: "Name", limit: 64, yes: "Continue" }) : choice;
  if (!user) return people();
  await changeSettings({ user });
  location.hash = "";
  await show(null);
  return emit("history");
}
