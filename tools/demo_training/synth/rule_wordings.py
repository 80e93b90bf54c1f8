"""Wordings of the rules that an answer can be asked to keep; all of it is our own text.

Each kind has imperatives ("use no commas", put behind "please", "make sure to" and the like) and
whole sentences. The fields are what the rule names: {n} a count, {k} words, {w} a word, {l} a
letter, {i} an ordinal, {mark}, {phrase}.
"""

from __future__ import annotations

import re

STARTS = (
    "{r}.",
    "{r}.",
    "{r}.",
    "Please {r}.",
    "Make sure to {r}.",
    "You should {r}.",
    "You must {r}.",
    "I want you to {r}.",
    "Remember to {r}.",
    "Also {r}.",
    "While answering, {r}.",
    "Be sure to {r}.",
    "When you write it, {r}.",
    "It is important to me that you {r}.",
)
IMPERATIVES = {
    "lower": (
        "use only lowercase letters",
        "write everything in small letters",
        "keep the whole answer in lowercase",
        "stay in lower case all the way through",
        "answer in English with lowercase letters only",
    ),
    "upper": (
        "use only capital letters",
        "write everything in capital letters",
        "answer in all caps",
        "keep the entire response in uppercase",
        "answer in English using capitals only",
        "shout, that is, write in capital letters from start to end",
    ),
    "nocomma": (
        "avoid commas",
        "leave out all commas",
        "refrain from using commas",
        "write without any commas",
        "stay away from commas in the whole response",
    ),
    "quote": (
        "put the whole answer in double quotation marks",
        "wrap everything you write in double quotes",
        "begin and end with a double quotation mark",
        "enclose your entire reply in double quotation marks",
        "surround the whole output with double quotation marks",
    ),
    "title": (
        "give it a title in double angle brackets, like <<a title>>",
        "put a title on top that is enclosed by double angle brackets: <<title>>",
        "add a title between << and >>",
        "include a title, and write the title inside << >>",
        "start with a title such as <<name of the text>>",
    ),
    "ps": (
        "add a postscript to the end, opened by {mark}",
        "close with a postscript beginning with {mark}",
        "put a {mark} note at the very end",
        "include a postscript, marked by {mark}",
        "write a postscript below your text, which starts with {mark}",
    ),
    "end": (
        "end with the exact phrase: {phrase}",
        'finish with this exact phrase: "{phrase}"',
        "close your answer with the words {phrase}",
        'let the very last words be "{phrase}"',
        "use this as your last sentence: {phrase}",
    ),
    "keywords": (
        "include the keywords {k}",
        "use the words {k}",
        "mention {k}",
        "work the words {k} into the text",
        "include these words in the response: {k}",
        "include the following keywords: {k}",
        "make use of the keywords {k}",
    ),
    "frequency": (
        "use the word {w} at least {n} times",
        "mention {w} at least {n} times",
        "include the word {w} {n} or more times",
        "let the keyword {w} occur at least {n} times",
        "repeat the word {w} so that it is there at least {n} times",
    ),
    "rarely": (
        "use the word {w} fewer than {n} times",
        "mention {w} less than {n} times",
        "let the word {w} occur less than {n} times",
    ),
    "forbidden": (
        "avoid the words {k}",
        "leave out the words {k}",
        "refrain from using the words {k}",
        "stay away from the following words: {k}",
        "exclude the keywords {k}",
        "write it without saying {k}",
    ),
    "letter": (
        "use the letter {l} at least {n} times",
        "let the letter {l} appear at least {n} times",
        "include {n} or more letters {l}",
        "write it so that the letter {l} is there at least {n} times",
    ),
    "fewletter": (
        "use the letter {l} fewer than {n} times",
        "let the letter {l} appear less than {n} times",
        "keep the letter {l} below {n} appearances",
    ),
    "placeholders": (
        "put at least {n} placeholders in square brackets, such as [place], into it",
        "leave at least {n} blanks in square brackets like [name] or [date]",
        "include {n} or more placeholders in square brackets, for example [email]",
        "use square brackets for at least {n} placeholders, e.g. [phone]",
    ),
    "highlight": (
        "highlight at least {n} parts with markdown, like *this part*",
        "mark {n} or more sections of the text with single asterisks: *marked part*",
        "emphasize at least {n} phrases by putting them in *italics* of markdown",
        "highlight {n} sections or more in markdown, that is *section*",
        "set at least {n} passages between asterisks, such as *passage*",
    ),
    "capwords": (
        "write {n} words or more in capitals only",
        "use {n} or more words in capitals",
        "put at least {n} words in full caps",
        "include at least {n} fully capitalized words",
    ),
    "fewcaps": (
        "use fewer than {n} words made of capitals only",
        "keep words in full capitals below {n}",
        "write less than {n} words in all caps",
    ),
    "bullets": (
        "use exactly {n} bullet points, each starting with *",
        "answer in a list of {n} markdown bullets",
        "give exactly {n} bullet points like:\n* First thing.\n* Second thing",
        "list exactly {n} points, with a * in front of each",
        "make it exactly {n} bullets in markdown format",
    ),
    "paragraphs": (
        "write exactly {n} paragraphs with the markdown divider *** between them",
        "separate the {n} paragraphs by ***",
        "make it {n} paragraphs long and put *** between two paragraphs",
        "use {n} paragraphs that are divided by three asterisks, ***",
    ),
    "firstword": (
        "write {n} paragraphs with an empty line between them, and begin the {i} paragraph "
        "with the word {w}",
        "use exactly {n} paragraphs, split by two new lines, where paragraph {x} starts with {w}",
        "start the {i} of your {n} paragraphs with the word {w}; two line breaks separate them",
    ),
    "sections": (
        "use {n} sections, each starting with {mark} and its number",
        "divide it into {n} parts and mark their beginnings by {mark} X, for example {mark} 1",
        "write {n} sections marked with {mark} X like this:\n{mark} 1\n[text]\n{mark} 2\n[text]",
        "split the text into {n} sections and open each with {mark} 1, {mark} 2 and so on",
    ),
    "two": (
        "give two different answers with ****** between them",
        "write two versions, separated by six asterisks: ******",
        "offer 2 different responses and put 6 asterisks (******) between the two",
        "answer twice, in two different ways, with ****** as the only separator",
    ),
    "json": (
        "give everything as JSON",
        "answer with valid JSON only",
        "put the whole output in JSON format",
        "format your entire answer as a JSON object",
        "use JSON for the complete output",
    ),
    "manysent": (
        "write at least {n} sentences",
        "use {n} or more sentences",
        "make it at least {n} sentences long",
        "give me no fewer than {n} sentences",
    ),
    "fewsent": (
        "use fewer than {n} sentences",
        "answer in less than {n} sentences",
        "keep it under {n} sentences",
        "stay below {n} sentences",
    ),
    "atleast": (
        "write at least {n} words",
        "use {n} or more words",
        "make it at least {n} words long",
        "answer with at least {n} words",
        "write no less than {n} words",
    ),
    "fewwords": (
        "use fewer than {n} words",
        "answer with less than {n} words",
        "stay under {n} words",
        "keep it below {n} words",
        "limit yourself to less than {n} words",
    ),
    "language": (
        "answer in {l} only",
        "write your entire response in {l}",
        "use only the {l} language",
        "reply in {l}, no other language is fine",
        "give the complete answer in the {l} language",
    ),
}
SENTENCES = {
    "lower": (
        "Do not use any capital letters.",
        "No capital letters, please.",
        "All letters must be lowercase.",
        "Your whole response should have lowercase letters only.",
        "The answer should be English text in lowercase.",
        "Capital letters are forbidden.",
    ),
    "upper": (
        "All letters must be capitals.",
        "The entire answer has to be English in capital letters only.",
        "Your response must be in uppercase.",
        "No lowercase letters are allowed.",
        "I only want capital letters in your response.",
    ),
    "nocomma": (
        "Do not use any commas.",
        "No commas are allowed.",
        "Your answer must not contain a comma.",
        "The response should be free of commas.",
        "Do not put a comma anywhere.",
        "Commas are not allowed in the text.",
    ),
    "quote": (
        "Double quotes should stand around your entire response.",
        "The first and the last character must be a double quotation mark.",
        "Everything should stand in double quotation marks.",
    ),
    "title": (
        "It needs a title in double angle brackets, such as <<my text>>.",
        "The text must have a title, written like <<this>>.",
        "The answer must hold a title inside double angular brackets, e.g. <<title>>.",
    ),
    "ps": (
        "The text should close with a postscript, and its start is {mark}",
        "At the end of it, a postscript with {mark} is needed.",
        "Do not forget a postscript that begins with {mark}",
    ),
    "end": (
        'Your last words must be "{phrase}" and nothing may follow.',
        "The answer must end with: {phrase} No other words should come after this.",
        "The very end of it should read {phrase}",
        "Nothing should follow your final phrase, which is: {phrase}",
    ),
    "keywords": (
        "Your answer must contain the keywords {k}.",
        "The words {k} have to be in it.",
        "Your response should include the words {k}.",
        "The following keywords are required: {k}.",
        "Keywords: {k}.",
        "I want to see the words {k} in the text.",
    ),
    "frequency": (
        "The word {w} has to come up at least {n} times.",
        "The keyword {w} must appear {n} or more times.",
        "I want to read the word {w} at least {n} times.",
    ),
    "rarely": (
        "The word {w} should come up less than {n} times.",
        "Do not use {w} {n} times or more.",
    ),
    "forbidden": (
        "Do not use the words {k}.",
        "Do not include the keywords {k} in the response.",
        "The words {k} are not allowed.",
        "Never say {k}.",
        "Do not mention {k} at all.",
        "The following words must not appear: {k}.",
    ),
    "letter": (
        "The letter {l} should come up at least {n} times.",
        "In your response the letter {l} has to appear {n} times or more.",
    ),
    "fewletter": (
        "The letter {l} should come up less than {n} times.",
        "Fewer than {n} letters {l} are allowed.",
    ),
    "placeholders": (
        "Your answer must contain at least {n} placeholders in square brackets, like [city].",
        "At least {n} placeholders, e.g. [date], should stand in square brackets.",
        "There should be {n} or more blanks in square brackets such as [company].",
    ),
    "highlight": (
        "At least {n} parts of it should be highlighted, i.e. *highlighted part*.",
        "There should be {n} or more sections highlighted with markdown like *this*.",
        "Your text must have at least {n} *highlighted* phrases in markdown.",
    ),
    "capwords": (
        "Let fully capitalized words appear {n} times or more.",
        "At least {n} words must be written in capital letters.",
        "I want at least {n} words in all caps in it.",
    ),
    "fewcaps": (
        "Words that are capitals only may come up less than {n} times.",
        "There should be fewer than {n} words in full caps.",
    ),
    "bullets": (
        "The answer should be a list of exactly {n} bullet points in markdown, each with a *.",
        "There must be exactly {n} bullet points. Use * for them, such as:\n* This is a point.",
        "I need exactly {n} bullets.",
    ),
    "paragraphs": (
        "There should be {n} paragraphs. Paragraphs are separated with ***.",
        "It must have exactly {n} paragraphs with *** between them.",
        "The text should consist of {n} paragraphs, divided by the markdown separator: ***",
    ),
    "firstword": (
        "There should be {n} paragraphs. Two new lines separate the paragraphs from each other. "
        "Paragraph {x} must start with the word {w}.",
        "It should have {n} paragraphs with two line breaks between them, and the {i} one must "
        "start with {w}.",
    ),
    "sections": (
        "The text must have {n} sections. Begin every section with {mark} X, such as:\n{mark} 1\n"
        "[text of it]",
        "It should have {n} parts, marked as {mark} 1, {mark} 2 and so forth.",
    ),
    "two": (
        "I need two different responses, separated by ******.",
        "There should be two answers that differ, with six asterisks ****** between them.",
        "Both of your two answers should stand in one text with ****** in the middle.",
    ),
    "json": (
        "The whole output should be JSON.",
        "Your entire answer must be in JSON format. Markdown ticks such as ``` are fine.",
        "Only JSON is accepted as output.",
    ),
    "manysent": (
        "The text should have at least {n} sentences.",
        "There should be {n} sentences or more.",
        "I need at least {n} sentences.",
    ),
    "fewsent": (
        "The answer should have less than {n} sentences.",
        "It must contain fewer than {n} sentences.",
        "No more than {m} sentences, please.",
    ),
    "atleast": (
        "The answer should contain at least {n} words.",
        "Your text needs at least {n} words.",
        "I need {n} words or more.",
        "The length should be {n}+ words.",
    ),
    "fewwords": (
        "The whole thing should be less than {n} words.",
        "The answer should have fewer than {n} words.",
        "Less than {n} words, please.",
    ),
    "language": (
        "The entire response should be in {l}.",
        "Only the {l} language is allowed in your answer.",
        "I can only read {l}, so no other language please.",
    ),
}
# patterns in a wording, and what may stand there instead
SWAPS = (
    (
        r"\b(your|the|The|Your|whole|entire|complete) (?:answer|response|reply|output|text)\b",
        (r"\1 answer", r"\1 response", r"\1 response", r"\1 reply", r"\1 output", r"\1 text"),
    ),
    (r"\b(?:whole|entire|complete)\b", ("whole", "entire", "entire", "complete", "full")),
    (
        r"\bat least \{n\}",
        (
            "{n} or more",
            "a minimum of {n}",
            "no fewer than {n}",
            "at least {n}",
            "not less than {n}",
        ),
    ),
    (r"\b(?:less|fewer) than \{n\}", ("less than {n}", "fewer than {n}", "not as many as {n}")),
    (r"\bexactly \{n\}", ("exactly {n}", "{n}", "precisely {n}", "just {n}")),
    (
        r"\b(?:should|must) (?=be|have|contain|stand|start)",
        ("should ", "must ", "has to ", "needs to "),
    ),
    (r"\bDo not\b", ("Don't", "Do not", "You may not", "You should not", "Never")),
    (r"\bcapital letters\b", ("capital letters", "uppercase letters", "capitals")),
    (r"\blowercase\b", ("lowercase", "lowercase", "lower case")),
    (r"\binclude\b", ("include", "include", "use", "add", "contain")),
    (r"\bmarkdown\b", ("markdown", "Markdown", "markdown format")),
    (r"\bdouble quotation marks\b", ("double quotation marks", "double quotes", "quotation marks")),
)
EMPHASIS = re.compile(r"\b(?:must|not|only|entire|all|no|exactly|at least|never)\b")
