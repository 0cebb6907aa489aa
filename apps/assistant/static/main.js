// The page: its parts, its address (#/c/ID is a conversation), its keys, and what happens when the server goes away.
import { healthy } from "./api.js";
import * as chat from "./chat.js";
import { invite } from "./compare.js";
import * as composer from "./composer.js";
import { find, icon, openDialog } from "./dom.js";
import * as history from "./history.js";
import { attempt, emit, loadState, on, pending, reload, session, show, stop, written } from "./session.js";
import * as settings from "./settings.js";
import * as taste from "./taste.js";
import * as watch from "./watch.js";

const PHONE = matchMedia("(max-width: 760px)");
const PULSE_MS = 1500;
let pulse = null;
let invited = null;

for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
for (const part of [chat, composer, history, settings, taste, watch]) part.start();
find("#open-settings").addEventListener("click", settings.open);
find("#open-taste").addEventListener("click", () => attempt(taste.open));
find("#open-keys").addEventListener("click", () => openDialog(find("#keys")));
find("#toggle").addEventListener("click", () => drawer());
find("#shade").addEventListener("click", () => drawer(false));
window.addEventListener("hashchange", route);
window.addEventListener("keydown", press);
window.addEventListener("server-gone", lost);
window.addEventListener("locked-out", () => tell("This address is locked. Open the one that edgealign app printed."));
PHONE.addEventListener("change", () => drawer(!PHONE.matches));
on("opened", () => {
  const id = session.conversation?.id;
  if (id && location.hash !== `#/c/${id}`) window.history.pushState(null, "", `#/c/${id}`);
  if (PHONE.matches) drawer(false);
});
on("change", () => {
  const pair = pending();
  if (pair && pair.id !== invited) requestAnimationFrame(invite);
  invited = pair?.id;
});
drawer(!PHONE.matches);
await begin();

async function begin() {
  try {
    await loadState();
  } catch (error) {
    if (error.status) tell(error.message);
    return;
  }
  await route();
  emit("history");
  document.body.classList.add("ready");
  if (!PHONE.matches) find("#field").focus();
}

async function route() {
  const id = /^#\/c\/([0-9a-f]{32})$/.exec(location.hash)?.[1] ?? null;
  try {
    await show(id);
  } catch (error) {
    if (error.status !== 404) return;
    window.history.replaceState(null, "", "#");
    await show(null);
  }
}

/** Open or close the list of conversations. On a phone it lies over the page, which then waits. */
function drawer(open = document.body.classList.contains("closed")) {
  document.body.classList.toggle("closed", !open);
  find("#toggle").setAttribute("aria-expanded", String(open));
  find("#side").inert = !open;
  find("#main").inert = open && PHONE.matches;
  if (open && PHONE.matches) find("#new").focus(); // and not the search: that would bring up the keyboard
}

function press(event) {
  const control = event.ctrlKey || event.metaKey;
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (written()) stop();
    else if (PHONE.matches) (drawer(false), find("#toggle").focus());
    else find("#field").focus();
    return;
  }
  if (!control || event.altKey) return;
  const shifted = { o: history.begin, d: () => attempt(taste.open) };
  const plain = { k: () => (drawer(true), find("#search").focus()), b: () => drawer(), ",": settings.open, "/": () => openDialog(find("#keys")) };
  const action = (event.shiftKey ? shifted : plain)[event.key.toLowerCase()];
  if (action) (event.preventDefault(), action());
}

function tell(text) {
  if (find("#banner").textContent !== text) find("#banner").textContent = text; // said again, it would be read out again
  find("#banner").hidden = false;
}

/** The server is gone: say so, and look for it until it is back. */
function lost() {
  tell("edgealign is not running any more. Start it again with “edgealign app”: what was said is kept.");
  pulse ??= setInterval(async () => {
    if (!(await healthy())) return;
    clearInterval(pulse);
    pulse = null;
    find("#banner").hidden = true;
    if (!session.info) return begin();
    await attempt(loadState);
    if (session.conversation && !written()) await reload().catch(() => {});
    emit("history");
  }, PULSE_MS);
}
