// A conversation is a tree: a message knows the one above it. `head` is the last message of the branch on show.

/** The messages from the first question to the head. */
export function branch(conversation) {
  const known = new Map(conversation.messages.map((message) => [message.id, message]));
  const found = [];
  for (let at = known.get(conversation.head); at; at = known.get(at.parent)) found.push(at);
  return found.reverse();
}

/** The versions of a message, itself included, oldest first: everything under the same parent. */
export function versions(conversation, message) {
  return conversation.messages.filter((other) => other.parent === message.parent);
}

/** The end of the branch that goes on below a message, by the latest reply each time. */
export function tip(conversation, message) {
  let at = message;
  for (;;) {
    const next = conversation.messages.findLast((other) => other.parent === at.id);
    if (!next) return at;
    at = next;
  }
}

/** The comparison that still waits for a choice under the last question on show, if there is one. */
export function waiting(conversation) {
  const head = conversation.messages.find((message) => message.id === conversation.head);
  return conversation.comparisons.findLast(
    (pair) => pair.choice === null && (pair.left === head?.id || pair.right === head?.id),
  );
}

/** What choices said about an answer: "edit", "chosen", "passed over", or nothing. */
export function verdict(conversation, message) {
  const pair = conversation.comparisons.findLast(
    ({ left, right, choice }) => (choice === "left" || choice === "right") && (left === message.id || right === message.id),
  );
  if (!pair) return null;
  if (pair[pair.choice] !== message.id) return "passed over";
  return pair.source === "edit" ? "edit" : "chosen";
}
