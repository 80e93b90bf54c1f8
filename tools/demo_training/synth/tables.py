"""Word tables from which the synthetic documents are written. All of it is our own text."""

from __future__ import annotations


def pairs(text: str, separator: str = ",") -> dict[str, str]:
    """`key:value` entries of a text, entries split at `separator` and at line ends."""
    entries = (entry.strip() for line in text.splitlines() for entry in line.split(separator))
    return dict(entry.split(":", 1) for entry in entries if entry)


def items(text: str, separator: str = ",") -> list[str]:
    """Entries of a text, split at `separator` and at line ends."""
    return [x.strip() for line in text.splitlines() for x in line.split(separator) if x.strip()]


NAMES = [
    "Tom",
    "Anna",
    "Lily",
    "Ben",
    "Max",
    "Mia",
    "Sam",
    "Zoe",
    "Leo",
    "Emma",
    "Jack",
    "Ruby",
    "Oscar",
    "Nina",
    "Paul",
    "Clara",
    "Hugo",
    "Ella",
    "Felix",
    "Ivy",
    "Noah",
    "Rosa",
    "Omar",
    "Lena",
    "Finn",
    "Maya",
    "Adam",
    "Sara",
    "Theo",
    "Alice",
    "Peter",
    "Nora",
    "Simon",
    "Eva",
    "Lucas",
    "Hana",
    "Victor",
    "June",
    "Carl",
    "Molly",
    "Ravi",
    "Yuki",
    "Ali",
    "Dora",
    "Hans",
    "Greta",
    "Marco",
    "Lucy",
    "Kim",
    "Tariq",
    "Elsa",
    "Bruno",
    "Mary",
    "John",
    "David",
    "Julia",
    "Rex",
    "Bella",
    "Otto",
    "Pia",
]

# animal: sound, food, where it lives, name of the young, legs
ANIMALS = {
    key: tuple(value.split("|"))
    for key, value in pairs(
        """dog:barks|meat and bones|in a house or a yard|puppy|4
cat:meows|fish and mice|in a house|kitten|4
cow:moos|grass and hay|on a farm|calf|4
horse:neighs|grass and oats|in a stable|foal|4
duck:quacks|plants and insects|in a pond|duckling|2
owl:hoots|mice and small birds|in the forest|owlet|2
lion:roars|meat|in the savanna|cub|4
wolf:howls|meat|in the forest|pup|4
frog:croaks|insects|in a pond|tadpole|4
bee:buzzes|nectar and pollen|in a hive|larva|6
sheep:bleats|grass|in a meadow|lamb|4
goat:bleats|grass and leaves|in the mountains|kid|4
pig:oinks|roots and grain|on a farm|piglet|4
hen:clucks|seeds and worms|in a coop|chick|2
bear:growls|berries and fish|in the forest|cub|4
snake:hisses|mice and eggs|in the grass|hatchling|0
elephant:trumpets|leaves and grass|in the savanna|calf|4
monkey:chatters|fruit and leaves|in the jungle|infant|4
fox:yelps|mice and berries|in a den|kit|4
mouse:squeaks|seeds and cheese|in a hole|pup|4
rabbit:makes little sound|grass and carrots|in a burrow|kit|4
tiger:roars|meat|in the jungle|cub|4
penguin:honks|fish|in the cold south|chick|2
dolphin:clicks and whistles|fish|in the sea|calf|0
spider:makes no sound|insects|in a web|spiderling|8"""
    ).items()
}

CAPITALS = pairs("""France:Paris,Germany:Berlin,Italy:Rome,Spain:Madrid,Japan:Tokyo,China:Beijing
Egypt:Cairo,Russia:Moscow,Greece:Athens,Norway:Oslo,Sweden:Stockholm,Finland:Helsinki
Denmark:Copenhagen,Poland:Warsaw,Austria:Vienna,Hungary:Budapest,Portugal:Lisbon,Ireland:Dublin
Canada:Ottawa,Mexico:Mexico City,Brazil:Brasilia,Argentina:Buenos Aires,Chile:Santiago,Peru:Lima
Cuba:Havana,India:New Delhi,Thailand:Bangkok,Vietnam:Hanoi,Kenya:Nairobi,Turkey:Ankara
Iran:Tehran,Iraq:Baghdad,Belgium:Brussels,Switzerland:Bern,Australia:Canberra,England:London
the United States:Washington,Ukraine:Kyiv,South Korea:Seoul,Nepal:Kathmandu,Iceland:Reykjavik
Scotland:Edinburgh,Romania:Bucharest,Bulgaria:Sofia,Croatia:Zagreb,Serbia:Belgrade
Slovakia:Bratislava,Estonia:Tallinn,Latvia:Riga,Lithuania:Vilnius,Colombia:Bogota
New Zealand:Wellington,Morocco:Rabat,Pakistan:Islamabad,Indonesia:Jakarta,Jamaica:Kingston""")
CONTINENTS = pairs("""France:Europe,Germany:Europe,Italy:Europe,Spain:Europe,Norway:Europe
Poland:Europe,Greece:Europe,Japan:Asia,China:Asia,India:Asia,Thailand:Asia,Vietnam:Asia
Egypt:Africa,Kenya:Africa,Morocco:Africa,Brazil:South America,Chile:South America
Peru:South America,Argentina:South America,Canada:North America,Mexico:North America""")
LANGUAGES = pairs("""France:French,Germany:German,Italy:Italian,Spain:Spanish,Japan:Japanese
China:Chinese,Russia:Russian,Greece:Greek,Norway:Norwegian,Sweden:Swedish,Finland:Finnish
Denmark:Danish,Poland:Polish,Austria:German,Hungary:Hungarian,Portugal:Portuguese
Brazil:Portuguese,Mexico:Spanish,Chile:Spanish,Turkey:Turkish,England:English,Egypt:Arabic""")
OPPOSITES = pairs("""hot:cold,big:small,happy:sad,fast:slow,up:down,day:night,light:dark,old:new
rich:poor,hard:soft,open:closed,full:empty,loud:quiet,early:late,clean:dirty,wet:dry,strong:weak
thick:thin,high:low,long:short,near:far,easy:difficult,true:false,right:wrong,brave:afraid
young:old,wide:narrow,deep:shallow,heavy:light,first:last,win:lose,buy:sell,begin:end,love:hate
laugh:cry,push:pull,give:take,cold:hot,small:big,sad:happy,slow:fast,good:bad,bad:good,inside:outside
left:right,north:south,east:west,friend:enemy,answer:question,war:peace,summer:winter,always:never""")
SYNONYMS = pairs("""big:large,small:little,happy:glad,sad:unhappy,fast:quick,smart:clever
begin:start
end:finish,angry:mad,quiet:silent,pretty:beautiful,hard:difficult,easy:simple,rich:wealthy,old:ancient
scared:afraid,tired:weary,gift:present,road:street,help:assist,look:watch,speak:talk,shut:close""")
PLURALS = pairs("""child:children,mouse:mice,foot:feet,tooth:teeth,man:men,woman:women,goose:geese
sheep:sheep,fish:fish,leaf:leaves,wolf:wolves,city:cities,box:boxes,baby:babies,knife:knives,dog:dogs
house:houses,potato:potatoes,story:stories,bus:buses""")
PAST = pairs("""go:went,eat:ate,see:saw,run:ran,take:took,give:gave,come:came,make:made,write:wrote
sing:sang,drink:drank,swim:swam,buy:bought,find:found,think:thought,sleep:slept,fly:flew,grow:grew
know:knew,speak:spoke,play:played,walk:walked,help:helped,work:worked,look:looked,cook:cooked
dance:danced,read:read,build:built,teach:taught,bring:brought,drive:drove,hide:hid,lose:lost""")
CATEGORIES = {
    key: items(value, " ")
    for key, value in pairs(
        """fruit:apple banana orange pear plum grape cherry mango peach lemon
vegetable:carrot potato onion cabbage spinach pea bean tomato
colour:red blue green yellow purple orange white black brown pink
tool:hammer saw drill wrench axe shovel
bird:robin owl eagle sparrow crow duck swan
instrument:piano violin guitar drum flute trumpet harp
sport:football tennis swimming running hockey chess
metal:iron gold silver copper tin lead
vehicle:car bus train bicycle boat truck plane
planet:Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune
season:spring summer autumn winter
shape:circle square triangle rectangle
animal:dog cat cow horse lion wolf sheep bear fox mouse
flower:rose tulip daisy lily sunflower
drink:water milk tea coffee juice
country:France Italy Spain Japan India Egypt Brazil Canada
month:January March May July October December"""
    ).items()
}
COLOURS_OF = pairs("""the sky:blue,grass:green,snow:white,coal:black,a banana:yellow,blood:red
a carrot:orange,milk:white,the sun:yellow,a strawberry:red,chocolate:brown,a leaf:green
a lemon:yellow,a tomato:red,a swan:white,a raven:black,an orange:orange""")
PLACES = items("""forest,village,garden,beach,mountain,farm,castle,river,city,school,market,library
island,valley,park,lighthouse,bakery,train station,meadow,harbour,museum,hospital,kitchen,bridge
desert,lake,theatre,tower,cave,field""")
OBJECTS = items("""red ball,golden key,old map,wooden boat,silver bell,blue kite,small lamp,big book
warm coat,shiny stone,green hat,paper star,glass jar,brass clock,toy train,magic brush,soft blanket
broken watch,tin box,long rope,yellow umbrella,white candle,black bag,round mirror,little drum""")
COLOURS = items("red,blue,green,yellow,white,black,brown,pink,purple,grey,silver,golden")
THINGS = items("""ball,kite,hat,coat,cup,book,bag,box,key,lamp,car,bike,pen,shirt,clock,bell,boat
chair
umbrella,basket,scarf,watch,drum,ring,doll,phone,plate,ticket,candle,coin,stone,map""")
ADJECTIVES = [
    "kind",
    "brave",
    "curious",
    "clever",
    "gentle",
    "quiet",
    "cheerful",
    "lazy",
    "proud",
    "shy",
    "loyal",
    "patient",
    "young",
    "old",
    "tiny",
    "strong",
]
WEATHER = [
    "sunny",
    "rainy",
    "windy",
    "snowy",
    "foggy",
    "warm",
    "cold",
    "cloudy",
    "stormy",
    "bright",
]
FOODS = items("""bread,soup,honey,apples,cheese,cake,rice,pancakes,berries,nuts,fish,porridge
noodles
pizza,salad,carrots,eggs,chocolate""")
JOBS = items("""painter,teacher,baker,doctor,sailor,singer,dancer,cook,farmer,writer,pilot,king
gardener,firefighter,musician,clown,astronaut,dentist,poet,detective""")
BEINGS = items("""robot,boy,girl,farmer,king,queen,sailor,baker,dragon,wizard,ghost,princess,knight
teacher,pirate,giant,witch,astronaut,snowman,fairy,doctor,child,old man,old woman""")
GOALS = items("""learn to swim,learn to fly,see the sea,find a friend,climb the mountain
go to school
learn to read,see the moon,win the race,build a house,bake a cake,sing on a stage,find the treasure
visit the city,help everyone,learn to dance,fly to the stars,plant a garden,travel the world,be free
go home,catch a fish,write a book,play the piano,sail a boat,save the village""")
NUMBER_WORDS = items("two,three,four,five,six")
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = items("""January,February,March,April,May,June,July,August,September,October
November,December""")
FRENCH = pairs("""good morning:bonjour,thank you:merci,yes:oui,no:non,water:eau,bread:pain
house:maison,cat:chat,dog:chien,book:livre,red:rouge,white:blanc,day:jour,night:nuit,friend:ami
goodbye:au revoir,sun:soleil,milk:lait,hello:bonjour,please:s'il vous plaît,school:école""")
GERMAN = pairs("""good morning:guten Morgen,thank you:danke,yes:ja,no:nein,water:Wasser,bread:Brot
house:Haus,cat:Katze,dog:Hund,book:Buch,red:rot,white:weiß,day:Tag,night:Nacht,friend:Freund
goodbye:auf Wiedersehen,sun:Sonne,milk:Milch,hello:hallo,please:bitte,school:Schule""")
SPANISH = pairs("""good morning:buenos días,thank you:gracias,yes:sí,no:no,water:agua,bread:pan
house:casa,cat:gato,dog:perro,book:libro,red:rojo,white:blanco,day:día,night:noche,friend:amigo
goodbye:adiós,sun:sol,milk:leche,hello:hola,please:por favor,school:escuela""")
TEXT_TYPES = items("""poem,song,riddle,review,resume,product description,advertisement,plan
itinerary
speech,summary,tweet,proposal,dialogue,report,joke,haiku,rap,limerick,press release,startup pitch
critique,outline,lesson,diary entry,news article,invitation,toast""")
SPARE_WORDS = [
    "time",
    "people",
    "water",
    "house",
    "world",
    "light",
    "music",
    "story",
    "friend",
    "winter",
    "summer",
    "letter",
    "paper",
    "money",
    "school",
    "garden",
    "morning",
    "evening",
    "road",
    "window",
]
PLURAL_TOPICS = items("""trains,cats,dogs,birds,books,flowers,computers,cars,stars,trees,horses
friends
robots,planes,games,songs,dreams,bees,mountains,rivers,holidays,children,pets,old houses,whales""")
SINGLE_TOPICS = items("""music,football,love,friendship,school,food,happiness,time,space,art,coffee
tea,chocolate,peace,kindness,family,sleep,work,science,history,the internet,my family,a good life
artificial intelligence,climate change,healthy food,city life,a holiday,my birthday,honesty,sport
hope,courage,reading,dancing,cooking,money,freedom,childhood""")
NATURE = items("""the sea,the moon,the sun,the sky,the wind,rain,snow,autumn,spring,summer,winter
nature
the night,the rainbow,the ocean,the weather,the desert,the forest,the rain,a river,the sunrise
fire""")
