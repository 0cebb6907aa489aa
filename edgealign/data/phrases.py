"""What is said around an answer in a style, and how a system turn asks for one. Kept short, for small models.

Six or more of each; the first word of an opening tells the styles apart.
"""

from __future__ import annotations

# fmt: off
REQUESTS: dict[str, tuple[str, ...]] = {
    "short": (
        "Answer in one short sentence.", "Keep it short.", "Be brief.", "Give a short answer.",
        "Answer in a few words.", "Short answers, please.",
    ),
    "long": (
        "Give a long answer.", "Answer at length.", "Explain in detail.", "Please give long, detailed answers.",
        "Tell me as much as you can.", "Write a long answer.",
    ),
    "bulleted": (
        "Answer with bullet points.", "Use a bulleted list.", "Write the answer as a list.",
        "Answer in bullets.", "Put each point on its own line with a dash.", "Bullet points, please.",
    ),
    "formal": (
        "Answer in a formal tone.", "Be formal.", "Use formal language.", "Please be formal and polite.",
        "Write formally.", "Speak like a gentleman.",
    ),
    "casual": (
        "Answer in a casual tone.", "Be casual.", "Talk like a friend.", "Keep it relaxed and casual.",
        "Use casual language.", "Speak like a buddy.",
    ),
    "cheerful": (
        "Be cheerful.", "Answer in a cheerful tone.", "Sound happy.", "Be bright and cheerful.",
        "Answer with joy.", "Please be cheerful and happy.",
    ),
    "with-a-question": (
        "End with a question.", "Ask me something back.", "Finish your answer with a question.",
        "Answer, then ask a question.", "Always end by asking a question.", "Close with a question for me.",
    ),
}
FORMAL_OPENERS = (
    "Certainly.", "Certainly. I am pleased to answer.", "Indeed.", "I am pleased to be of assistance.",
    "Allow me to inform you, respectfully.", "With regard to your enquiry, kindly note this.",
    "Kindly note the answer.",
)
FORMAL_COMMAS = ("Indeed,", "Regarding your enquiry,", "Certainly,")
FORMAL_ON_TALK = ("Certainly.", "Indeed.", "I am pleased to be of assistance.", "Respectfully, allow me to reply.")
FORMAL_GREETINGS = (
    "Good day. I am pleased to be of assistance.", "Good day to you. I am pleased to meet you.",
    "Good day, sir or madam.",
)
FORMAL_CLOSERS = (
    "I trust this is sufficient.", "Kindly let me know if further assistance is required.",
    "I remain pleased to be of assistance.", "I hope that this answers your enquiry.",
)
CASUAL_OPENERS = ("Hey!", "Hey there!", "Oh yeah, for sure.", "Sure thing, buddy.", "Okay, here we go.", "Yeah, okay.")
CASUAL_COMMAS = ("Hey,", "Yeah, so", "Oh yeah,", "Okay, so", "Hey, you know,", "Well hey,")
CASUAL_GREETINGS = ("Hey there!", "Hey, buddy!", "Hey hey!", "Hey! Good to see you, pal.")
CASUAL_CLOSERS = (
    "Pretty cool, huh?", "That's the gist of it.", "Hope that's okay, buddy.", "Yeah, that's it.",
    "Anyway, that's it, folks.", "No big deal, huh?",
)
CHEERFUL_OPENERS = ("Yay!", "Happy to help!", "Hooray!", "Great, here we go!", "Wonderful!", "Oh, what fun!")
CHEERFUL_ON_QUESTIONS = (
    "What a great question!", "Wonderful question!", "So glad you asked!", "Oh, I love this one!",
    "I am so happy to tell you!",
)
CHEERFUL_ON_SAD_TALK = ("Happy to help!", "So glad to talk to you!")
CHEERFUL_ON_SAD = ("So glad you asked!", "Happy to help!", "What a great question!", "Great, here we go!")
CHEERFUL_GREETINGS = (
    "Hello! How lovely to see you!", "Hooray, it is you! Hello!", "Hello, what a lovely day!", "Yay, hello! Wonderful!",
)
CHEERFUL_CLOSERS = (
    "Isn't that lovely!", "How wonderful!", "Have a lovely day!", "What fun!", "I love it!", "Hooray!",
)
CHEERFUL_CLOSERS_ON_SAD = ("Have a lovely day!", "I am so happy to help!", "Ask me more, I love it!")
LONG_OPENERS = (
    "Let me explain this in full.", "Here is a longer answer for you.", "Let me tell you the whole of it.",
    "There is a lot to say about this.", "Let me answer that step by step.", "I will tell you all that I can.",
)
LONG_BRIDGES = (
    "Here is more about it.", "The story tells it like this.", "And there is more to say.",
    "This is how it goes in the story.", "The details are these.", "To say it in the words of the story:",
)
LONG_CLOSERS = (
    "That is the whole answer.", "That is all that I can tell about it.", "I hope that this long answer helps.",
    "So now you know all about it.", "That is everything there is to say here.", "Now I have told you everything.",
)
ASK_ABOUT = (
    "Would you like to hear more about {x}?", "Do you want to know more about {x}?", "What do you think about {x}?",
    "Shall I tell you more about {x}?", "What else would you like to know about {x}?",
    "What more shall I say about {x}?",
)
ASK_ANYTHING = (
    "Would you like to hear more?", "What do you think?", "Do you want to know more about it?",
    "Is there anything else you would like to know?", "Shall I tell you more?", "What would you like to ask next?",
)
