// What is typed and not sent yet: kept in this tab over reloads and looks elsewhere, and gone with its conversation.
import { session, speaker } from "./session.js";

const NEW = "new";
const whose = (user) => `draft:${encodeURIComponent(user)}:`;
const of = (conversation) => `${whose(conversation?.user ?? speaker())}${conversation?.id ?? NEW}:`;

/** Where the text of a field is kept: the next question of a conversation, or other words for one of its messages. */
export const placeOf = (conversation, message = null) => of(conversation) + (message?.id ?? "");

export const draftAt = (place) => sessionStorage.getItem(place);

/** Keep a text; null drops it. */
export function keepDraft(place, text) {
  if (text === null) sessionStorage.removeItem(place);
  else sessionStorage.setItem(place, text);
}

/** The message of a conversation that was being edited, if there is one. */
export const editedIn = (conversation) => conversation.messages.findLast((message) => draftAt(placeOf(conversation, message)) !== null);

/** Drop what belongs to a conversation ({id, user}). */
export const dropDrafts = (conversation) => dropAll(of(conversation));

/** Drop what belongs to a user. */
export const dropDraftsOf = (user) => dropAll(whose(user));

function dropAll(start) {
  for (const place of Object.keys(sessionStorage)) if (place.startsWith(start)) sessionStorage.removeItem(place);
}
