"""Forty fixed prompts for a small model: stories with a question, greetings, simple instructions, two turns.

All texts were written for this file. The keywords of a story are the words of which a right answer has at least one.
A story comes before its question, after a blank line, which is how the reading questions of the training data look.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.data.forms import Message

STORY, GREETING, INSTRUCTION, TWO_TURNS = "story", "greeting", "instruction", "two turns"


@dataclass(frozen=True)
class Prompt:
    """What is asked. `story`, `question` and `keywords` belong to prompts about a given story."""

    kind: str
    messages: tuple[Message, ...]
    story: str = ""
    question: str = ""
    keywords: tuple[str, ...] = ()

    @property
    def last(self) -> str:
        return self.messages[-1].content


STORIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Anna had a little red boat. One day she took it to the river. The wind was strong and the boat sailed away. "
        "Anna ran along the river and caught the boat at the old bridge.",
        "Where did Anna catch the boat?",
        ("bridge",),
    ),
    (
        "A fox was very hungry. He saw some grapes high up on a wall. He jumped and jumped, but he could not reach "
        "them. At last the fox went home and ate an egg.",
        "What did the fox see on the wall?",
        ("grapes", "grape"),
    ),
    (
        "Tom and his grandmother baked a cake. They put apples and honey in it. When the cake was ready, Tom took a "
        "big piece to his friend Ben, who was sick in bed.",
        "Why did Tom take cake to Ben?",
        ("sick", "bed", "friend"),
    ),
    (
        "There was once a king who had a golden bird. Every morning the bird sang in the garden. One night a thief "
        "opened the cage, and the bird flew away into the forest. The king was very sad.",
        "Who opened the cage?",
        ("thief",),
    ),
    (
        "Mia was afraid of the dark. Her father gave her a small lamp that looked like the moon. Mia put the lamp "
        "beside her bed. From that night on she slept well.",
        "What did Mia's father give her?",
        ("lamp", "moon"),
    ),
    (
        "A farmer had a donkey that would not walk. He pulled and he pushed, but the donkey stood still. Then a boy "
        "held a carrot in front of the donkey, and it walked all the way to the market.",
        "How did the boy make the donkey walk?",
        ("carrot",),
    ),
    (
        "It snowed all night. In the morning Lily and her brother made a big snowman. They gave him a carrot for a "
        "nose and an old hat. In the afternoon the sun came out, and the snowman melted.",
        "What happened to the snowman?",
        ("melted", "melt", "sun"),
    ),
    (
        "An old woman lived alone in a house near the sea. One stormy day she found a wet kitten at her door. She "
        "dried the kitten and gave it warm milk. Now she was not alone any more.",
        "What did the old woman find at her door?",
        ("kitten", "cat"),
    ),
    (
        "Sam lost his dog in the park. He called and called, but the dog did not come. Then Sam heard a bark behind "
        "the tall tree. The dog was stuck in a hole, and Sam pulled him out.",
        "Where was the dog?",
        ("hole", "tree", "park"),
    ),
    (
        "A little bear wanted to catch a fish. He sat by the river, but he talked all the time and the fish swam "
        "away. His mother told him to be quiet. Then the little bear caught a big fish.",
        "What did the mother tell the little bear?",
        ("quiet",),
    ),
    (
        "The princess had lost her ring in the deep well. A green frog brought it back to her. The princess thanked "
        "the frog and made him a small house in the garden.",
        "Who brought the ring back to the princess?",
        ("frog",),
    ),
    (
        "Two mice found a piece of cheese. Each of them wanted all of it, and they began to fight. While they were "
        "fighting, a crow came down and took the cheese away.",
        "Who took the cheese?",
        ("crow",),
    ),
    (
        "On Monday Jack planted a bean in a pot. He gave it water every day. After two weeks a green plant came out "
        "of the earth. Jack was so happy that he showed it to his teacher.",
        "How did Jack feel when the plant came out?",
        ("happy", "glad"),
    ),
    (
        "A shepherd boy was bored. He shouted that a wolf was coming, and all the people ran to help, but there was "
        "no wolf. The next day a real wolf came. The boy shouted again, and nobody came.",
        "Why did nobody come the second time?",
        ("lied", "lie", "believe", "believed", "trust"),
    ),
    (
        "Nora and her mother went to the market. They bought bread, six eggs and a basket of strawberries. On the way "
        "home Nora ate all the strawberries, and her face was red.",
        "What did Nora eat on the way home?",
        ("strawberries", "strawberry"),
    ),
    (
        "A giant lived on a hill. The children were afraid of him because he was so big. One day a small girl fell "
        "into the river, and the giant saved her. After that the children played with him.",
        "Who saved the small girl?",
        ("giant",),
    ),
)

GREETINGS = (
    "Hello!",
    "Hi, how are you today?",
    "Good morning! What is your name?",
    "I am happy today.",
    "I feel a little sad.",
    "What do you like to do?",
    "Thank you for your help.",
    "Good night!",
)

INSTRUCTIONS = (
    "Tell me a short story about a cat.",
    "What color is the sky?",
    "Name three animals that live on a farm.",
    "Why do birds have wings?",
    "How can I make a friend?",
    "What do we need to bake bread?",
    "Write one sentence about the sea.",
    "What should I wear when it rains?",
    "Where does a bear sleep in winter?",
    "Give me an idea for a birthday present.",
)

CONVERSATIONS = (
    (
        "I have a new puppy.",
        "That is wonderful! What is your puppy called?",
        "He is called Max. What can I play with him?",
    ),
    (
        "Do you like books?",
        "Yes, I like books very much. Do you?",
        "I like books about the sea. What is one about?",
    ),
    (
        "It is raining and I am bored.",
        "You could draw a picture or read a book.",
        "I want to draw. What should I draw?",
    ),
    (
        "What is your favorite animal?",
        "I like horses. They are strong and kind.",
        "Can a horse run faster than a dog?",
    ),
    (
        "I am hungry.",
        "Would you like some soup or an apple?",
        "I would like soup. How do I make it?",
    ),
    (
        "Tell me about the moon.",
        "The moon shines at night. It goes around the earth.",
        "And what about the sun?",
    ),
)


def all_prompts() -> tuple[Prompt, ...]:
    """The forty prompts, always in this order."""
    stories = [
        Prompt(STORY, (Message("user", f"{story}\n\n{question}"),), story, question, keywords)
        for story, question, keywords in STORIES
    ]
    single = [
        Prompt(kind, (Message("user", text),))
        for kind, texts in ((GREETING, GREETINGS), (INSTRUCTION, INSTRUCTIONS))
        for text in texts
    ]
    double = [
        Prompt(TWO_TURNS, (Message("user", first), Message("assistant", answer), Message("user", second)))
        for first, answer, second in CONVERSATIONS
    ]
    return (*stories, *single, *double)
