"""Essays of up to a thousand words about any topic: sentences in one order, a subset of them."""

from __future__ import annotations

from . import prose_tables as pt
from .pieces import Pieces, Topic
from .prose import essay, fill

ESSAY_SENTENCES = 24  # what `prose.essay` can fill without repeating itself

MORE = (
    "Let us begin with the simple things that everybody can see.",
    "At first sight {t} may seem easy to understand.",
    "When you look a little closer, {t} can surprise you.",
    "Most of us first hear about {t} when we are young.",
    "Later in life we see {t} with other eyes.",
    "A teacher once told me that {t} can be a good lesson.",
    "My grandmother had her own opinion about {t}, and she was often right.",
    "In many families people still talk about {t} at dinner.",
    "Some say that {t} will soon be forgotten, but I do not believe it.",
    "There are towns where {t} {is} part of daily life.",
    "In other places hardly anyone has heard of {t}.",
    "This shows how different our lives can be.",
    "One should also think about the costs.",
    "Time is the first thing that {t} ask{s} of us.",
    "Money plays a role too, but it is not the most important one.",
    "With patience and good will a lot can be done.",
    "It is wise to ask for help when you do not know what to do.",
    "A friend of mine tried to learn everything about {t} in one week.",
    "It did not work, but it was a good week.",
    "After that we often laughed about {t} together.",
    "You can find many pictures of {t} in old books.",
    "Some of them are beautiful, and some of them are strange.",
    "Writers and painters have always liked {t}.",
    "A song about {t} can stay in your head for days.",
    "There are also people who work with {t} every day.",
    "They know small secrets that others never notice.",
    "If you meet one of them, ask a question and listen.",
    "The answer will often be longer than you expect.",
    "Children ask the best questions about {t}.",
    "They want to know where it all comes from and where it will go.",
    "We should answer them honestly.",
    "It is no shame to say that we do not know.",
    "Science has something to say about {t} as well.",
    "Careful people measure, compare and write down what they find.",
    "Step by step they learn a little more.",
    "Still, no machine can feel what {t} mean{s} to a person.",
    "Let us now look at the other side.",
    "Not everyone is happy about {t}.",
    "Some people have had bad luck, and we should listen to them.",
    "A fair view of {t} needs both the light and the shadow.",
    "Rules can help, as long as they are simple.",
    "The best rule is to be kind to each other.",
    "A second rule is to finish what you have started.",
    "A third rule is to rest when you are tired.",
    "With these rules {t} can be a pleasure for everyone.",
    "What will the future bring for {t}?",
    "Nobody can say for sure, but we may dream a little.",
    "Perhaps {t} will look quite different in a hundred years.",
    "Perhaps our grandchildren will smile about what we think today.",
    "New tools will come, and old ones will be kept in museums.",
    "But people will still sit together and talk about {t}.",
    "That thought makes me calm and glad.",
    "If you want to begin today, begin with something small.",
    "Take a sheet of paper and write down three things about {t}.",
    "Read them again tomorrow and add one more.",
    "After a month you will have a long list.",
    "Show your list to a friend and talk about it.",
    "You will see that {t} {has} more sides than you thought.",
    "Do not worry about mistakes, because they show the way.",
    "A mistake with {t} is a lesson that you never forget.",
    "In the evening, sit down and think about the day.",
    "Maybe {t} made you smile, or maybe {it} made you think.",
    "Both are good reasons to go on.",
    "Let me tell you one more thing before I stop.",
    "The most important part of {t} cannot be put into words.",
    "You have to find it by yourself.",
    "Take your time and keep your eyes open.",
    "Then {t} will stay with you for a long time.",
)


def long_essay(p: Pieces, topic: Topic, count: int, opener: bool = True) -> list[str]:
    """`count` different sentences on a topic, up to 85 or so; fewer if the tables have no more."""
    if count <= ESSAY_SENTENCES // 2:
        return essay(p, topic, max(1, count), opener)
    own = [*pt.BY_KIND[topic.kind], *pt.MIDDLES, *MORE]
    head, tail = p.choice(pt.OPENERS), p.choice(pt.CLOSERS)
    return [fill(s, topic) for s in (head, *p.ordered(own, count - 2), tail)]
