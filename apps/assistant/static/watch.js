// What goes on behind the page, with the panel open or not: choices that are being read, a LoRA in training. Each user
// of whom something is going on is looked after until it is done; then it is said, whoever is speaking by now.
import { call } from "./api.js";
import { toast } from "./dom.js";
import { attempt, emit, loadState, on, settings } from "./session.js";

const LOOK_MS = 500; // between two looks
const AGAIN_MS = 2000; // after a look that failed: the server may come back
const watched = new Map(); // user -> GET /api/taste of the last look; null: none yet
let looking = null;
let speaking = null;

export const tasteOf = (user, rest = "") => `/api/taste${rest}?${new URLSearchParams({ user })}`;
const goesOn = ({ learning, training }) => learning || training.state === "running";
const newest = ({ versions }) => versions.at(-1)?.version ?? 0;

export function start() {
  on("taught", ({ detail }) => attempt(() => taught(detail)));
  on("state", () => {
    const { user } = settings();
    if (user !== speaking) watch(user); // something may be going on since before the page was opened
    speaking = user;
  });
}

/** Look after this user until nothing goes on any more; `taste`: what the server has just said of them. */
export function watch(user, taste = null) {
  if (taste && !goesOn(taste)) return;
  watched.set(user, taste ?? watched.get(user) ?? null);
  looking ??= setTimeout(look, LOOK_MS);
}

/** Say what a choice taught; `learned` null: nothing is learned of this user, or it takes longer than a moment. */
async function taught({ user, learned }) {
  if (learned) {
    const { words, version, reason } = learned;
    toast(!version ? `Noted: ${reason}.` : reason ? `${soFar(words)} ${reason}.` : soFar(words));
    return version ? loadState() : undefined; // a first version is another model to answer with
  }
  const taste = await call("GET", tasteOf(user));
  if (!taste.ready) return toast(`Kept, but nothing is learned from it at once: ${taste.why_not}.`);
  toast(goesOn(taste) ? "Noted. It is still being learned from." : soFar(taste.words));
  return goesOn(taste) ? watch(user, taste) : loadState();
}

const soFar = (words) => (words ? `So far: ${words}.` : "Noted: nothing stands out yet.");

async function look() {
  let failed = false;
  for (const user of [...watched.keys()]) {
    const taste = await call("GET", tasteOf(user)).catch((error) => error);
    if (taste instanceof Error) {
      failed = true;
      continue;
    }
    const before = watched.get(user);
    if (goesOn(taste)) watched.set(user, taste);
    else watched.delete(user);
    emit("taste", taste);
    if (before) await ended(before, taste);
  }
  looking = watched.size ? setTimeout(look, failed ? AGAIN_MS : LOOK_MS) : null;
}

/** Say what is done since the look before. */
async function ended(before, { user, learning, training, words, ...taste }) {
  const trained = before.training.state === "running" && training.state !== "running";
  if (!trained && !(before.learning && !learning)) return;
  const read = newest(taste) > newest(before) ? soFar(words) : "Noted: everything was kept as it is.";
  const said = trained ? training.message || "The training ended with the server: train again." : read;
  toast(user === settings().user ? said : `${user}: ${said}`);
  await loadState().catch(() => {}); // there may be another model to answer with
}
