"""Questions with one fixed answer: definitions, reasons, general knowledge."""

from __future__ import annotations

from .tables import pairs

DEFINITIONS = pairs(
    """computer:a machine that follows instructions and works with data
bridge:a structure that lets people cross a river or a road
teacher:a person who helps others learn
doctor:a person who takes care of sick people
library:a place where people can read and borrow books
rainbow:a band of colours in the sky that appears when sunlight meets rain
volcano:a mountain that can throw out hot melted rock
island:land with water all around it
desert:a very dry place with little rain
ocean:a very large body of salt water
clock:a device that shows the time
friend:a person you know well and like
cloud:a mass of tiny water drops in the sky
forest:a large area full of trees
map:a picture that shows where places are
kitchen:a room where food is cooked
telephone:a device for talking with people far away
token:a small piece of text that a language model reads or writes
river:a long stream of water that flows to the sea or to a lake
mountain:a very high piece of land
planet:a large round body that moves around a star
star:a huge ball of hot gas that shines in the sky
school:a place where children learn
hospital:a place where sick people are treated
museum:a place that shows old or beautiful things
farmer:a person who grows plants and keeps animals for food
baker:a person who makes bread and cakes
pilot:a person who flies a plane
engine:a machine that makes things move
robot:a machine that can do tasks by itself
poem:a text in which words are chosen for their sound and feeling
novel:a long story in a book
triangle:a shape with three sides
circle:a round shape without corners
dictionary:a book that explains what words mean
camera:a device that takes pictures
umbrella:a thing that keeps you dry in the rain
bicycle:a vehicle with two wheels that you move with your feet
language model:a program that has learned to continue text
indexer:a small part of the model that picks the most useful past tokens
cache:a store for things that will soon be needed again
program:a list of instructions for a computer
holiday:a time when you do not have to work
garden:a piece of land where flowers and vegetables grow
winter:the coldest season of the year
candle:a stick of wax that gives light when it burns""",
    "\n",
)
MASS_NOUNS = pairs(
    """gravity:the force that pulls things towards the ground
ice:water that is frozen
snow:frozen water that falls from the sky in soft white flakes
honesty:telling the truth and not hiding it
music:sound that is arranged to be pleasant or to express feelings
electricity:a form of energy that lights our homes and runs machines
oxygen:a gas in the air that we need to breathe
photosynthesis:the way plants use sunlight, water and air to make their food
evaporation:what happens when water turns into gas
democracy:a form of rule in which the people vote
friendship:the bond between people who like and help each other
sparse attention:a way for a model to look only at a few important tokens of the past
machine learning:a way to let computers learn from examples""",
    "\n",
)
REASONS = pairs(
    """is the sky blue:Blue light from the sun is scattered by the air more than other colours. \
That is why the sky looks blue.
do birds fly south:Birds fly south because it is warm there and they find more food in winter.
do we sleep:We sleep so that the body and the mind can rest and repair themselves.
does ice float:Ice floats because it is lighter than the same amount of water.
do leaves fall:Leaves fall in autumn because the tree saves water and energy for the winter.
is the sea salty:The sea is salty because rivers carry salt from rocks into it.
do we eat:We eat because food gives us energy and helps us grow.
does it rain:It rains when small drops of water in the clouds join and become too heavy.
do cats purr:Cats often purr when they are happy and feel safe.
is the grass green:Grass is green because of a green substance that helps it use sunlight.
do we need water:We need water because every part of the body works with it.
does the moon shine:The moon shines because it reflects the light of the sun.
do we dream:Nobody knows exactly. Dreams may help the brain to sort what happened during the day.
is the sun hot:The sun is hot because deep inside it small particles join and set energy free.
do people laugh:People laugh because something is funny, and it brings them closer together.
do we have seasons:We have seasons because the axis of the Earth is tilted as it moves around the \
sun.
do dogs bark:Dogs bark to warn others, to call them or because they are excited.
do we brush our teeth:We brush our teeth to keep them clean and healthy.
is exercise good for us:Exercise makes the heart and the muscles strong and helps us to sleep.
do bees make honey:Bees make honey so that they have food in the winter.
do plants need light:Plants need light because they use it to make their food.
do we wear coats in winter:We wear coats in winter because they keep the warm air close to the body.
is reading good for you:Reading teaches you new words and ideas, and it is fun.
do we need sparse attention:Long texts make full attention slow. Sparse attention looks only at \
the most useful tokens, so it stays fast.""",
    "\n",
)
# question stems -> whole answer
GENERAL = pairs(
    """What is the largest planet?|Which planet is the largest?:The largest planet is Jupiter.
What is the smallest planet?:The smallest planet is Mercury.
Which planet is closest to the sun?:Mercury is closest to the sun.
How many planets are there?|How many planets are in the solar system?:There are 8 planets in the \
solar system.
What is the largest ocean?|Which ocean is the largest?:The Pacific is the largest ocean.
What is the highest mountain?|What is the tallest mountain in the world?:The highest mountain is \
Mount Everest.
What is the longest river?|Which river is the longest?:The Nile is often called the longest river.
What is the largest animal?|Which animal is the biggest?:The largest animal is the blue whale.
What is the fastest land animal?|Which animal runs fastest?:The fastest land animal is the cheetah.
What is the tallest animal?:The tallest animal is the giraffe.
Who wrote Romeo and Juliet?|Who is the author of Hamlet?:William Shakespeare wrote it.
Who wrote Alice in Wonderland?:Lewis Carroll wrote Alice in Wonderland.
Who wrote Peter Pan?:J. M. Barrie wrote Peter Pan.
Who painted the Mona Lisa?:Leonardo da Vinci painted the Mona Lisa.
Who was the first man on the moon?|Who first walked on the moon?:Neil Armstrong was the first man \
on the moon.
Who was Albert Einstein?:Albert Einstein was a physicist who became famous for the theory of \
relativity.
Who was Napoleon?:Napoleon was an emperor of France who fought many wars in Europe.
Who was Mozart?:Mozart was a composer from Austria.
What is the freezing point of water?|At what temperature does water freeze?:Water freezes at 0 \
degrees Celsius.
What is the boiling point of water?|At what temperature does water boil?:Water boils at 100 \
degrees Celsius.
What is the formula of water?|What is water made of?:Water is made of hydrogen and oxygen. Its \
formula is H2O.
How many seconds are in a minute?:There are 60 seconds in a minute.
How many minutes are in an hour?:There are 60 minutes in an hour.
How many hours are in a day?:There are 24 hours in a day.
How many days are in a year?:A year has 365 days, and a leap year has 366.
How many weeks are in a year?:There are 52 weeks in a year.
How many letters are in the alphabet?:The English alphabet has 26 letters.
How many continents are there?:There are 7 continents.
How many sides does a triangle have?:A triangle has 3 sides.
How many sides does a square have?:A square has 4 sides.
How many centimetres are in a metre?:There are 100 centimetres in a metre.
How many metres are in a kilometre?:There are 1000 metres in a kilometre.
How many fingers does a hand have?|How many fingers are on one hand?:A hand has 5 fingers.
How many wheels does a bicycle have?:A bicycle has 2 wheels.
How many wheels does a car have?:A car has 4 wheels.
How many legs does an insect have?:An insect has 6 legs.
What do bees make?:Bees make honey.
What do cows give us?:Cows give us milk.
Where does the sun rise?:The sun rises in the east.
Where does the sun set?:The sun sets in the west.
Is the sun a star?:Yes, the sun is a star.
Is the Earth round?:Yes, the Earth is round.
Is a whale a fish?:No, a whale is a mammal.
Is a tomato a fruit?:Yes, a tomato is a fruit, although we use it as a vegetable.
Can penguins fly?:No, penguins cannot fly, but they swim very well.
Can fish breathe under water?:Yes, fish breathe under water with their gills.
What comes after winter?|Which season comes after winter?:Spring comes after winter.
What comes after summer?|Which season comes after summer?:Autumn comes after summer.
What is the hottest season?:Summer is the hottest season.
What is the coldest season?:Winter is the coldest season.
What is the first month of the year?:January is the first month of the year.
What is the last month of the year?:December is the last month of the year.
What is the first letter of the alphabet?:The first letter of the alphabet is A.
What is the last letter of the alphabet?:The last letter of the alphabet is Z.
What do you use to cut paper?:You use scissors to cut paper.
What do you use an umbrella for?:You use an umbrella to stay dry in the rain.
Which gas do we need to breathe?|What do we breathe?:We need oxygen to breathe.
What are the primary colours?|Name the primary colours.:The primary colours are red, yellow and \
blue.
What are the four seasons?|Name the four seasons.:The four seasons are spring, summer, autumn and \
winter.
What are the seven days of the week?|Name the days of the week.:Monday, Tuesday, Wednesday, \
Thursday, \
Friday, Saturday and Sunday.
What colour do you get when you mix blue and yellow?:Blue and yellow make green.
What colour do you get when you mix red and yellow?:Red and yellow make orange.
What colour do you get when you mix red and blue?:Red and blue make purple.""",
    "\n",
)
