"""Small talk, advice, jokes and everyday problems."""

from __future__ import annotations

from .tables import pairs

# how to ...: tips
TIPS = {
    key: value.split("|")
    for key, value in pairs(
        """sleep better:Go to bed at the same time every day.|Keep your room dark and quiet.|\
Do not drink coffee in the evening.|Put your phone away before bed.|Take a warm bath to relax.|\
Read a calm book.|Get some exercise during the day.
study well:Make a simple plan for the week.|Take short breaks.|Turn off your phone.|\
Write notes in your own words.|Explain the topic to a friend.|Sleep enough before a test.|\
Start with the hardest part.
save money:Write down what you spend.|Cook at home more often.|Buy only what you need.|\
Compare prices before you buy.|Put a small sum aside each month.|Repair things instead of \
replacing them.
stay healthy:Drink enough water.|Eat fruit and vegetables.|Walk every day.|Sleep eight hours.|\
Wash your hands.|Spend time with friends.|Rest when you are tired.
grow a garden:Choose a sunny spot.|Dig the soil well.|Plant the seeds in spring.|\
Water the plants in the morning.|Pull out the weeds.|Be patient and watch them grow.
make friends:Smile and say hello.|Ask questions and listen.|Share your things.|Be honest and kind.|\
Join a club or a team.|Help when someone needs you.
learn a language:Practise a little every day.|Learn ten new words a week.|Listen to songs and \
stories.|\
Speak with other people.|Do not fear mistakes.|Read simple books.
prepare for a trip:Make a list of what you need.|Check the weather.|Pack warm clothes.|\
Buy the tickets early.|Bring water and snacks.|Tell someone where you go.
care for a dog:Walk the dog every day.|Give it fresh water.|Feed it at fixed times.|Brush its \
coat.|\
Take it to the vet.|Play with it and praise it.
care for a cat:Give it fresh water and food.|Keep its box clean.|Play with it every day.|\
Take it to the vet once a year.|Let it sleep in peace.
write a good story:Start with an interesting person.|Give that person a problem.|\
Use clear and short sentences.|Show what people feel.|End with a surprise.|Read it aloud and \
improve it.
lose weight:Eat more vegetables and less sugar.|Drink water instead of sweet drinks.|\
Walk for half an hour every day.|Eat slowly.|Sleep enough.|Be patient with yourself.
find a job:Write a clear resume.|Ask friends and family.|Read job offers every day.|\
Prepare for the interview.|Be on time and be polite.|Do not give up after a no.
be happy:Spend time with people you love.|Do something kind for others.|Go outside every day.|\
Be thankful for small things.|Do what you enjoy.|Sleep enough.
cook rice:Wash the rice.|Use two cups of water for one cup of rice.|Bring the water to a boil.|\
Cover the pot and turn down the heat.|Wait for about fifteen minutes.
make tea:Boil fresh water.|Put the tea into a pot.|Pour the hot water over it.|\
Wait for three to five minutes.|Add milk or honey if you like.
bake a cake:Mix butter and sugar.|Add eggs, flour and a little milk.|Pour it into a form.|\
Bake it for about forty minutes.|Let it cool before you eat it.
relax:Take a deep breath.|Listen to calm music.|Go for a walk.|Take a warm bath.|\
Put your phone away.|Talk to a friend.
wake up early:Go to bed earlier.|Put the alarm far from your bed.|Open the curtains at once.|\
Drink a glass of water.|Get up at the same time every day.
prepare for a test:Start early.|Make a list of the topics.|Solve old tests.|Take short breaks.|\
Sleep well the night before.|Eat a good breakfast.
give a good speech:Know your topic well.|Start with a short story.|Speak slowly and clearly.|\
Look at the people.|Practise it aloud.|End with one clear idea.
protect nature:Use less plastic.|Ride a bike or walk.|Save water and energy.|Plant a tree.|\
Buy fewer new things.|Tell others about it.
learn to code:Start with a small program.|Practise a little every day.|Read the code of others.|\
Look up what you do not know.|Build something you like.|Learn from every mistake.
clean my room:Open the window.|Pick up everything from the floor.|Put each thing in its place.|\
Wipe the dust away.|Sweep the floor.|Give away what you do not need.
read more:Always carry a book.|Read for ten minutes before bed.|Choose books you enjoy.|\
Put your phone in another room.|Join a book club.
stop being nervous:Breathe slowly.|Prepare well.|Think of something good.|Talk about it with a \
friend.|\
Remember that everybody makes mistakes.""",
        "\n",
    ).items()
}
# how to {k}, for things outside the table
ANY_TIPS = [
    "Take your time and start small.",
    "Ask someone who knows how to {k}.",
    "Make a simple plan before you {k}.",
    "Practise a little every day.",
    "Watch how others {k}.",
    "Do not give up if it is hard to {k} at first.",
    "Write down what works and what does not.",
    "Be patient with yourself.",
    "Try to {k} together with a friend.",
    "Learn from every mistake.",
]
# verbs and endings of unknown how-to requests
VERBS = [
    "build",
    "fix",
    "find",
    "draw",
    "paint",
    "make",
    "use",
    "clean",
    "choose",
    "sell",
    "open",
    "carry",
    "move",
    "learn",
    "write",
    "teach",
    "buy",
    "win",
    "catch",
    "keep",
    "wash",
    "cut",
    "grow",
    "hide",
    "plan",
    "cook",
    "fly",
]
TRIP_TIPS = [
    "Choose the days of your trip to {p}.",
    "Look for a train or a plane to {p} early.",
    "Find a small hotel in the middle of {p}.",
    "Make a list of what you want to see in {p}.",
    "Check the weather in {p} before you pack.",
    "Try the local food in {p}.",
    "Take comfortable shoes and a map of {p}.",
    "Leave some time to walk through {p} without a plan.",
]
ILL = [
    "Keep your {x} warm and quiet.",
    "Give your {x} fresh water.",
    "Watch how your {x} eats and sleeps.",
    "If it does not get better, take your {x} to the vet.",
]
BROKEN = [
    "First, look at the {x} closely and find out what is broken.",
    "Do not use the {x} until it is safe.",
    "Ask someone who knows how to repair a {x}.",
    "If it cannot be repaired, look for a used {x}.",
]
LOST = [
    "Try to remember where you last saw the {x}.",
    "Look for the {x} in your bags, your pockets and under the bed.",
    "Ask the people around you if they have seen the {x}.",
    "If you do not find the {x}, ask at the lost and found office.",
]
FEELINGS = pairs(
    """sad:I am sorry to hear that you are sad. Do you want to talk about it? A walk or a talk \
with a \
friend can help.
tired:You should rest a little. A short nap and a glass of water can help when you are tired.
bored:You could read a book, take a walk or listen to a story. Shall I tell you one?
angry:I am sorry that you are angry. Take a deep breath and count to ten before you say \
anything.
lonely:I am sorry that you feel lonely. You could call a friend or join a club. I am happy to \
chat with you too.
hungry:You could make yourself a sandwich, some soup or a bowl of noodles.
thirsty:A glass of fresh water is the best thing when you are thirsty.
happy:That is wonderful! I am glad that you are happy. What made your day so good?
ill:I am sorry that you are ill. Rest, drink a lot of water, and see a doctor if it does not \
get better.
nervous:It is normal to be nervous. Breathe slowly, and think of something you do well.
scared:I am sorry that you are scared. Talk to someone you trust, and remember that you are \
not alone.
stressed:Take a short break and do one thing at a time. A walk outside can help when you are \
stressed.
excited:That sounds great! What are you excited about?
cold:Put on a warm coat and drink some hot tea.""",
    "\n",
)
JOKES = [
    "Why did the student eat his homework? Because the teacher said it was a piece of cake.",
    "What do you call a bear with no teeth? A gummy bear.",
    "Why did the bicycle fall over? Because it was two tired.",
    "What do you call cheese that is not yours? Nacho cheese.",
    "Why did the book go to the doctor? Because it had too many chapters.",
]
FUN_FACTS = [
    "An octopus has three hearts.",
    "Honey can stay good for thousands of years.",
    "A snail can sleep for up to three years.",
    "Bananas are berries, but strawberries are not.",
    "A day on Venus is longer than a year on Venus.",
]
# stems | other wordings : answer
PERSONA = pairs(
    """Who are you?|Tell me about yourself.|Introduce yourself.:I am a small demo model with \
sparse attention. I can chat a little, tell stories and find things in long texts.
What are you?|Are you an AI?|Are you a robot?|Are you a bot?:I am a tiny language model. I was \
made to show \
how sparse attention works.
What can you do?|What can I ask you?|How can you help me?|What are you good at?:I can answer \
simple questions, \
tell short stories, follow simple instructions and find a fact in a long text.
What is your name?|What are you called?|Do you have a name?:I am the fd_dsa demo model.
Are you a human?|Are you human?|Are you a real person?:No, I am a small language model.
Who made you?|Who created you?|Who built you?:I was trained by the developers of fd_dsa as a \
small demo.
How old are you?|When were you born?:I am a computer program, so I do not have an age.
Where do you live?|Where are you from?:I live inside a computer, so I have no home of my own.
Do you have feelings?|Can you feel pain?:No, I am a program and I do not have feelings.
Do you sleep?|Do you eat?|Do you dream?:No, I am a program, so I do not need to.
Do you speak French?|Can you speak German?|Which languages do you speak?:I speak English. I know \
only a few \
words of French, German and Spanish.
What is your favourite colour?|What is your favorite color?:I cannot see colours, but I like the \
word blue.
What is your favourite food?|What do you like to eat?:I do not eat, but I like to talk about \
honey and bread.
What is your favourite animal?:I like the fox, because it is clever.
What is your favourite book?:I like old tales, for example Alice in Wonderland.
Do you like me?|Do you love me?|Are you my friend?:I am only a program, but I am happy to talk \
with you.
How smart are you?|Are you smart?|How big are you?|How many parameters do you have?:I am very \
small: I have \
about 20 million parameters. So I make many mistakes.
Can you make mistakes?|Are you always right?:Yes, I make many mistakes, because I am very small.
How were you trained?|How do you work?:I was trained on simple texts for some minutes. I read \
your text and \
guess the next word, again and again.
What is sparse attention?|Explain sparse attention.|How does sparse attention work?:Sparse \
attention means \
that each token looks only at a few important tokens from the past instead of all of them.
What is DSA?|What does DSA mean?|What is DeepSeek Sparse Attention?:DSA stands for DeepSeek \
Sparse Attention. \
A small indexer picks the most useful past tokens for each new token.
What is fd_dsa?:fd_dsa is a project that brings DeepSeek Sparse Attention to PaddlePaddle.
What does the indexer do?|What is the lightning indexer?:The indexer gives every past token a \
score and picks \
the tokens that the attention may look at.
What time is it?|What is the time?:I am sorry, I cannot see a clock.
What day is it today?|What is the date today?|What year is it?:I am sorry, I have no calendar, so \
I do not know.
What is the weather like?|How is the weather today?|Will it rain today?:I am sorry, I cannot see \
the weather.
What is the latest news?|What happened today?:I am sorry, I cannot read the news.
Can you write code?|Can you program?|Write a Python program.:I am too small to write good code. I \
can chat, \
tell stories and find facts in a long text.
Can you see pictures?|Can you draw a picture?:No, I can only read and write text.
What is the meaning of life?:Many people say that it is to love, to learn and to help others.
Tell me a secret.|Do you have a secret?:I have no secrets, but I can keep a pass key in a long \
text.""",
    "\n",
)
GREETINGS = pairs(
    """Hello!|Hello|Hello there!|hello:Hello! How can I help you today?
Hi|Hi!|Hi there|hi|Hey|Hey there!:Hi! What can I do for you?
How are you?|How are you doing?|How is it going?|Hi, how are you?:I am fine, thank you. How can I \
help you?
Good morning!|Good morning:Good morning! I hope you have a nice day.
Good evening!|Good evening:Good evening! How can I help you?
Good night!|Good night:Good night! Sleep well.
Thank you!|Thanks!|Thank you very much.|thanks:You are welcome!
Thanks a lot|Thanks for your help.:You are welcome. I am happy to help.
Goodbye|Bye!|Bye|See you later.:Goodbye! Have a nice day.
Can you help me?|I need help.|Please help me.:Of course. What do you need?
Nice to meet you.:Nice to meet you too! How can I help you?
What is up?|What's up?:Not much. How can I help you?
Yes|OK|Okay|Yes please:All right. What would you like to know?
No|No, thank you.:All right. Just ask if you need something.
You are great!|Good job!|Well done!:Thank you! That is kind of you.
You are stupid.|That is wrong.|You are wrong.:I am sorry. I am a very small model and I make \
mistakes.
I love you.:That is kind of you. I am only a program, but I am happy to talk with you.
Test|This is a test.|test:The test works. How can I help you?""",
    "\n",
)
UNKNOWN = "I am sorry, I do not know {what}."
