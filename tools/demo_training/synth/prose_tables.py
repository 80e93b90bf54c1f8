"""Sentence templates of stories, essays and poems."""

from __future__ import annotations

# plots: one list of wordings for each step; fields: n m names, x y beings, a b adjectives,
# p q places, o object, w weather, f food
PLOTS = [
    [  # something is lost and found
        [
            "Once upon a time, there was a {a} {x} named {n} who lived near the {p}.",
            "In a small house by the {p} lived a {a} {x} called {n}.",
            "Long ago, a {a} {x} named {n} lived close to the {p}.",
        ],
        [
            "One {w} morning, {n} lost a {o}.",
            "On a {w} day, {n} could not find the {o}.",
            "One day the {o} was gone, and {n} was very sad.",
        ],
        [
            "{n} looked under the bed and behind the door, but it was not there.",
            "{n} asked everyone at the {p}, but no one had seen it.",
            "{n} searched the whole {p} until the sun went down.",
        ],
        [
            'Then {m} the {y} came by and said, "I will help you."',
            "A {b} {y} named {m} heard the crying and came to help.",
            '"Do not cry," said {m} the {y}. "Let us look together."',
        ],
        [
            "They found the {o} under an old tree.",
            "Together they found the {o} beside the {q}.",
            "At last {m} saw the {o} shining in the grass.",
        ],
        [
            "{n} was so happy and shared some {f} with {m}.",
            "{n} thanked {m} and they ate {f} together.",
            "From that day on, {n} and {m} were best friends.",
            "They learned that a good friend is worth more than gold.",
        ],
    ],
    [  # a journey
        [
            "{n} was a {a} {x} who wanted to see the {q}.",
            "There was once a {x} named {n} who dreamed of the {q}.",
            "{n} the {x} had never left the {p}.",
        ],
        [
            "One {w} morning, {n} packed some {f} and a {o} and began to walk.",
            "So {n} took a {o} and set out early.",
            "With a {o} and a little {f}, {n} left home.",
        ],
        [
            "The road was long, and the night was cold.",
            "Soon it started to rain, and the path was hard to see.",
            "On the way, {n} had to sleep under a tree.",
        ],
        [
            'There {n} met a {b} {y} named {m}. "Where are you going?" asked {m}.',
            "A {b} {y} named {m} knew the way and walked along.",
            "A {y} named {m} came along, and they told each other stories and laughed.",
        ],
        [
            "After three days they reached the {q}.",
            "When they came to the {q}, the sun was rising.",
            "At last they saw the {q}, and it was more beautiful than any dream.",
        ],
        [
            '{n} smiled and said, "It was worth every step."',
            "And {n} never forgot that day.",
            "Then they went home together and told everyone about it.",
            "That night {n} slept well and dreamed of new roads.",
        ],
    ],
    [  # two neighbours
        [
            "{n} the {x} and {m} the {y} were neighbours near the {p}.",
            "A {a} {x} named {n} and a {b} {y} named {m} lived near the same {p}.",
        ],
        [
            "{n} worked all day, but {m} liked to sleep.",
            "{n} had plenty of {f}, but {m} had none.",
            "Every morning {n} went to work at the {q}, and {m} stayed at home.",
        ],
        [
            "One {w} day, a storm came and broke the roof of the house.",
            "Then winter came, and there was no food anywhere.",
            "One day {m} became ill and could not get up.",
        ],
        [
            "{m} asked for help, and {n} said yes.",
            "At first {n} was angry, but then felt sorry for {m}.",
            "{n} brought {f} and made a warm fire.",
        ],
        [
            '{m} said, "Thank you. I will work with you from now on."',
            "{m} was ashamed and promised to do better.",
            "Together they built a stronger house.",
        ],
        [
            "And so they both lived well.",
            "The lesson is that it is better to help than to laugh at others.",
            "The lesson is that work today brings bread tomorrow.",
        ],
    ],
    [  # a strange gift
        [
            "{n} the {x} had a {o}.",
            "One {w} morning, {n} the {x} got a {o} as a present.",
            "A {a} {x} named {n} found a {o} at the {p}.",
        ],
        [
            "It was the most wonderful thing {n} had ever seen.",
            "Whenever {n} touched it, something strange happened.",
            "{n} showed it to {m}, a {b} friend.",
        ],
        [
            '"Where did you get it?" asked {m}.',
            '"May I try it too?" asked {m}.',
            'But {m} said, "Be careful with it."',
        ],
        [
            "{n} did not listen and ran to the {q} with it.",
            "So they went to the {q} to try it out.",
            "{n} thought about it for a long time.",
        ],
        [
            "Suddenly there was a loud noise, and the {o} fell into the water.",
            "There they met an old {y} who had lost a {o} years ago.",
            "A strong wind came and carried the {o} away.",
        ],
        [
            "{n} let it go with a smile, and everyone was glad.",
            "{m} jumped after it and saved it.",
            "{n} learned to take better care of things.",
            "They laughed about it for many years.",
        ],
    ],
]
# plots about somebody who wants something; fields as above, g = the goal, X = "the robot" or the
# name
GOAL_PLOTS = [
    [
        [
            "Once there was a {a} {x} named {n} who wanted to {g}.",
            "{n} was a {a} {x} who lived near the {p} and wanted to {g}.",
            "Near the {p} lived a {x} named {n} who dreamed every night of the day it would {g}.",
        ],
        [
            'Everyone laughed and said, "A {x} cannot {g}."',
            'The others said, "You will never {g}."',
            "Nobody near the {p} believed that {n} could {g}.",
        ],
        [
            "But {n} did not give up and tried again every day.",
            "{n} was sad for a while but kept trying.",
            "So one {w} morning {n} packed some {f} and went to the {q}.",
        ],
        [
            'There a {b} {y} named {m} said, "I will show you how."',
            "At the {q} lived a {b} {y} named {m} who knew what to do.",
            '{m} the {y} saw it and said, "Let me help you."',
        ],
        [
            "They worked together for a whole year.",
            "Day after day they practised, and {n} got better and better.",
            "It was hard, but {m} was patient and {n} learned quickly.",
        ],
        [
            "At last the day came, and {n} could {g}. Everyone was amazed.",
            "In the end {n} did it. From then on, no one laughed at the {x} who wanted to {g}.",
            'So the dream to {g} came true, and {n} told the others, "Never give up."',
        ],
    ]
]

# essay sentences by the kind of topic; fields of Topic.words()
OPENERS = [
    "{T} {is} something that many people care about.",
    "There is a lot to say about {t}.",
    "When people think of {t}, they often remember something from their own life.",
    "It is easy to see why {t} matter{s}.",
    "Let me tell you a little about {t}.",
]
MIDDLES = [
    "{T} can bring joy to both young and old.",
    "Some people know a lot about {t}, while others are just starting to learn.",
    "A good way to start is to look at {t} with open eyes.",
    "In the past, {t} {was} different from what {it} {is} today.",
    "If you want to learn more about {t}, ask someone who knows.",
    "With a little time and care, anyone can understand {t}.",
    "My favourite part of {t} is how simple {it} can be.",
    "Of course, {t} {is} not always easy.",
    "Many books have been written about {t}.",
    "One small idea about {t} can change a whole day.",
    "It helps to talk about {t} with other people.",
    "People in every city and village know {t} in their own way.",
    "Some love {t}, and some do not, but few forget {them}.",
    "Every time I think of {t}, I notice something new.",
]
BY_KIND = {
    "place": [
        "{T} {is} a place that many people like to visit.",
        "You can spend hours in {t} and still find something new.",
        "In the morning {t} {is} quiet, and in the evening people come together there.",
        "The people you meet in {t} are friendly.",
        "If you go to {t}, take your time and look around.",
        "Many small things make {t} beautiful.",
        "In summer {t} {is} full of life.",
        "The best time to see {t} is early in the morning.",
    ],
    "nature": [
        "{T} {is} one of the wonders of nature.",
        "Poets have written about {t} for hundreds of years.",
        "On some days we hardly notice {t}, on others we cannot look away.",
        "Animals and plants know {t} better than we do.",
        "Children love to paint {t}.",
        "I could look at {t} for hours.",
        "{T} can be gentle, and {t} can be wild.",
        "When I am sad, {t} make{s} me feel better.",
    ],
    "being": [
        "{T} {is} always busy.",
        "Every day {t} get{s} up early and look{s} for something to eat.",
        "{T} {has} many friends and few enemies.",
        "At night {t} sleep{s} in a safe and quiet place.",
        "{T} {is} stronger than one would think.",
        "When {t} {is} happy, everybody can see it.",
        "Children love to watch {t}.",
        "We can learn patience from {t}.",
    ],
    "thing": [
        "People have used {t} for a long time.",
        "{T} can be big or small, old or new.",
        "You can see {t} almost everywhere.",
        "Without {t}, our days would be harder.",
        "We should take good care of {t}.",
        "I still remember the first time I saw {t}.",
        "There is a story behind {t}.",
        "{T} make{s} life a little easier.",
    ],
    "activity": [
        "{T} take{s} time, but it is worth it.",
        "You need a plan and a little courage for {t}.",
        "Before {t}, make a list of what you need.",
        "{T} {is} more fun with a friend.",
        "The first day of {t} is often the hardest.",
        "You can learn a lot from {t}.",
        "After {t}, you will have many stories to tell.",
        "Do not rush, and {t} will go well.",
    ],
    "idea": [
        "{T} mean{s} something different to each of us.",
        "Every day brings a new chance to enjoy {t}.",
        "Good friends can help each other with {t}.",
        "Still, most problems with {t} can be solved step by step.",
        "We should be patient when we deal with {t}.",
        "The best thing about {t} is that {it} keep{s} us curious.",
        "First, think about what {t} mean{s} to you.",
        "A life without {t} would be strange.",
    ],
}
CLOSERS = [
    "I hope this gives you a clear picture of {t}.",
    "That is why {t} {is} worth our time.",
    "To sum up, {t} {is} both useful and interesting.",
    "In the end, {t} will always be a part of our lives.",
    "So the next time you think of {t}, smile.",
]
COUPLETS = [
    "{T}, so full of light, you stay with me by day and night.",
    "I think of {t} when I wake, and see your face in every lake.",
    "Oh {t}, you make me sing, you are the finest, sweetest thing.",
    "When all the world is dark and cold, {t} turn{s} the grey to gold.",
    "{T} came softly through my door, and I was lonely nevermore.",
    "The wind is high, the road is long, but {t} give{s} my heart a song.",
    "Beneath the wide and open sky, {t} will never say goodbye.",
    "I looked for {t} far and near, and all the time you waited here.",
    "The stars come out, the day is done, and {t} and I sit in the sun.",
    "So let us dance, so let us play, for {t} brighten{s} up the day.",
    "The winter goes, the flowers grow, and {t} teach{es} me what I know.",
    "With {t} beside me, come what may, I find my courage and my way.",
]
HAIKUS = [
    "Soft light on {t},\nthe morning holds its breath now,\nand the day begins.",
    "{T} in the wind,\na quiet road leads homeward,\nthe evening is near.",
    "I think of {t},\nthe rain sings on the window,\nmy heart is at rest.",
]
SUBJECTS = ["{T}", "About {t}", "A note on {t}", "Some words about {t}"]
