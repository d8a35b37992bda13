# ruff: noqa: SIM905  (word lists read best as strings)
"""The vocabulary of the pocket model's small world: names, places, things and a few facts.

Everything the task generators talk about comes from here or is invented on the spot (`coined`), written by
hand, so that the corpus needs no download and has our own licence only. Lists are plain strings split on
white space or commas: easy to read, easy to extend. Order matters for reproducibility (seeded choices).
"""

import random

FIRST_NAMES = """
Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maya Noah Olga Paul Rosa Sam Tina Uma Victor Wendy
Xavier Yara Zoe Adam Bella Carlos Diana Eric Fatima George Hana Ivan Julia Karim Laura Marco Nina Oscar Petra
Quentin Rita Simon Theo Ursula Vera Walter Yusuf Zara Aisha Boris Chloe Daniel Elena Frank Gita Hugo Irene Jonas
Kira Luis Mina Nora Omar Priya Ravi Sofia Tom Valerie Will Yuki Alan Beth Cora Dora Eva Fred Gina Harry Iris Jim
Ken Lily Max Nick Olive Pia Rob Sara Ted Viola Amir Bruno Celia Dmitri Esther Fiona Gabriel Helen Ingrid James
Kofi Lena Miguel Nadia Otto Paula Ramon Silvia Tariq Ulrich Vivian Wanda Yolanda Akira Bianca Cedric Delia Edgar
Flora Greta Hassan Isabel Jorge Kenji Lucia Martin Naomi Olivia Pedro Rachel Stefan Teresa Vincent Agnes Albert
Alice Amara Andre Arthur Beatrice Bernard Camila Charles Claire Colin Dalia Derek Edith Elias Emil Ezra Farah
Freya Gloria Gustav Hector Hilda Igor Ines Jasmine Jerome Joan Joel Judith Kai Karl Lars Leila Linda Louis Lydia
Magnus Malik Maria Martha Mateo Maud Milan Miriam Mona Nathan Nils Odette Oliver Oskar Pablo Patrick Philip
Ralph Ruben Ruth Samir Selma Sven Sylvia Tamara Thomas Tobias Tracy Vanessa Violet Wolfgang Yasmin Zelda
Abigail Bogdan Chen Darius Eleni Farid Giulia Haruto Imani Jamal Katya Liam Mei Nikolai Oona Pavel Rania Sanjay
Thandi Umberto Vikram Wei Ximena Yannick Zainab
""".split()

LAST_NAMES = """
Adams Baker Carter Davis Evans Fischer Garcia Hughes Ito Jensen Kim Lopez Meyer Novak Olsen Patel Quinn Rossi
Smith Tanaka Ueda Vogel Walker Young Zhang Anders Berg Clark Dubois Ekman Ferrari Green Hall Ivanov Jones Khan
Larsen Moreau Nguyen Okafor Petrov Reed Santos Turner Ullman Vargas White Yilmaz Zimmer Abbott Becker Cohen Diaz
Ellis Foster Grant Hoffman Ibrahim Jansen Keller Lindqvist Marino Nakamura Osman Perez Ramos Schmidt Torres Umar
Vance Weber Yates Zeller Ali Brandt Costa Dunn Engel Flores Gupta Haas Isaac Johnson Koch Lehmann Mendoza Nilsson
Ortega Park Rahman Sato Thompson Valdez Wagner Xu Yang Zola Allen Bauer Chavez Duarte Eriksen Fontaine Gomez
Hernandez Iyer Jackson Kaya Lambert Martin Nielsen Owens Popov Rivera Stein Takahashi Varga Wilson Yamada Ziegler
Arnold Bishop Castro Dawson Erdem Fuchs Gruber Hansen Irwin Joshi Kovacs Lund Murphy Navarro Ozturk Price Rao
Sanders Toth Vidal West Abe Bianchi Collins Dietrich Farrell Graham Holm Jacobs King Leroy Mbeki Noor Palmer
Richter Singh Tran Vasquez Winter Amari Bose Cruz Doyle Faber Gallo Hayes Jung Kruger Lang Mori Nash Peters Roth
Silva Thorn Voss Wood Archer Blake Chan Drake Frost Glass Hunt Knight Lake Marsh Page Stone Swan Wolf
""".split()

CITIES = """
Paris,London,Berlin,Madrid,Rome,Oslo,Lisbon,Vienna,Prague,Dublin,Athens,Warsaw,Helsinki,Stockholm,Copenhagen,
Amsterdam,Brussels,Budapest,Zurich,Geneva,Milan,Naples,Venice,Turin,Munich,Hamburg,Cologne,Frankfurt,Lyon,Nice,
Bordeaux,Toulouse,Seville,Valencia,Porto,Krakow,Riga,Vilnius,Tallinn,Sofia,Belgrade,Zagreb,Istanbul,Ankara,Cairo,
Tunis,Lagos,Accra,Nairobi,Dakar,Cape Town,Durban,Tokyo,Osaka,Kyoto,Seoul,Busan,Beijing,Shanghai,Taipei,Hanoi,
Bangkok,Manila,Jakarta,Singapore,Delhi,Mumbai,Chennai,Kolkata,Dhaka,Karachi,Lahore,Tehran,Baghdad,Amman,Beirut,
Dubai,Doha,Muscat,Sydney,Melbourne,Perth,Brisbane,Auckland,Wellington,New York,Boston,Chicago,Denver,Seattle,
Houston,Dallas,Austin,Miami,Atlanta,Detroit,Portland,Phoenix,San Diego,Toronto,Montreal,Ottawa,Vancouver,Calgary,
Havana,Lima,Quito,Bogota,Caracas,Santiago,Buenos Aires,Montevideo,La Paz,Rio de Janeiro,Recife,Salvador,
Mexico City,Guadalajara,Reykjavik,Bergen,Gothenburg,Aarhus,Tampere,Ghent,Antwerp,Utrecht,Leeds,Bristol,York,Cardiff,
Glasgow,Edinburgh,Belfast,Cork,Galway,Marseille,Lille,Basel,Bern,Graz,Salzburg,Linz,Bonn,Leipzig,Dresden,Bremen,
Florence,Pisa,Verona,Palermo,Granada,Malaga,Bilbao,Faro,Gdansk,Lodz,Brno,Split,Sarajevo,Skopje,Tirana,Minsk,Kyiv,
Odessa,Tbilisi,Yerevan,Baku,Tashkent,Almaty,Ulaanbaatar,Kathmandu,Colombo,Phnom Penh,Kuala Lumpur,Hobart,Suva,Nadi
""".replace("\n", "").split(",")

CAPITALS = dict(
    pair.split(":")
    for pair in """France:Paris,Germany:Berlin,Spain:Madrid,Italy:Rome,Norway:Oslo,Portugal:Lisbon,Austria:Vienna,
Ireland:Dublin,Greece:Athens,Poland:Warsaw,Finland:Helsinki,Sweden:Stockholm,Denmark:Copenhagen,Belgium:Brussels,
Hungary:Budapest,Latvia:Riga,Lithuania:Vilnius,Estonia:Tallinn,Bulgaria:Sofia,Serbia:Belgrade,Croatia:Zagreb,
Turkey:Ankara,Egypt:Cairo,Tunisia:Tunis,Ghana:Accra,Kenya:Nairobi,Senegal:Dakar,Japan:Tokyo,South Korea:Seoul,
China:Beijing,Vietnam:Hanoi,Thailand:Bangkok,the Philippines:Manila,Indonesia:Jakarta,India:Delhi,Iran:Tehran,
Iraq:Baghdad,Jordan:Amman,Lebanon:Beirut,Qatar:Doha,Oman:Muscat,New Zealand:Wellington,Canada:Ottawa,Cuba:Havana,
Peru:Lima,Ecuador:Quito,Colombia:Bogota,Chile:Santiago,Argentina:Buenos Aires,Uruguay:Montevideo,
Mexico:Mexico City,Iceland:Reykjavik,the United Kingdom:London,Switzerland:Bern,Ukraine:Kyiv,Georgia:Tbilisi,
Armenia:Yerevan,Nepal:Kathmandu,Cambodia:Phnom Penh,Malaysia:Kuala Lumpur""".replace("\n", "").split(",")
)

ITEMS = """
lamp,chair,table,desk,sofa,carpet,mirror,clock,vase,candle,pillow,blanket,towel,basket,bucket,broom,ladder,hammer,
drill,screwdriver,wrench,nail,rope,torch,battery,cable,charger,keyboard,mouse,monitor,printer,laptop,phone,camera,
tablet,radio,speaker,headset,router,folder,notebook,pencil,pen,ruler,eraser,stapler,envelope,stamp,calendar,book,
novel,map,poster,globe,puzzle,ball,kite,drum,guitar,violin,flute,trumpet,piano,bicycle,helmet,skateboard,scooter,tent,
backpack,suitcase,umbrella,jacket,coat,shirt,sweater,dress,skirt,hat,cap,scarf,glove,sock,shoe,boot,sandal,belt,
watch,ring,necklace,wallet,bag,cup,mug,plate,bowl,fork,spoon,knife,pan,pot,kettle,toaster,blender,oven,fridge,jar,
bottle,box,tray,apple,banana,orange,lemon,melon,cherry,peach,pear,plum,grape,mango,cake,pie,cookie,muffin,pizza,
sandwich,burger,salad,soup,ticket,token,coupon,card,coin,brick,tile,plank,shelf,door,window,curtain,fan,heater,
plant,rose,tulip,cactus,seed,shovel,rake,hose,whistle,compass,telescope,microscope,magnet,needle,button,zipper,
desk lamp,coffee mug,office chair,garden hose,water bottle,phone case,picture frame,alarm clock,paper bag,wool scarf,
leather wallet,wooden spoon,glass bowl,tea cup,rain coat,bath towel,bed sheet,bread knife,cheese board,soup bowl,
table cloth,wall clock,floor lamp,tool box,lunch box,gift card,bus ticket,train ticket,concert ticket,tennis racket,
yoga mat,running shoe,winter jacket,sun hat,swim suit,board game,chess set,paint brush,rubber duck,teddy bear,
bird cage,fish tank,dog leash,cat toy,flower pot,watering can,light bulb,power strip,memory card,hard disk,
computer mouse,ink cartridge,paper clip,note pad,sticky note,file folder,door mat,shower curtain,laundry basket,
ironing board,sewing kit,first aid kit,travel pillow,sleeping bag,camping stove,fishing rod,bike pump,car seat
""".replace("\n", "").split(",")

COLOURS = "red blue green yellow black white brown pink purple orange grey silver golden beige violet".split()
SIZES = "small large big tiny huge medium little".split()
MATERIALS = "wooden plastic metal glass leather cotton paper steel stone woollen".split()

ANIMALS = """cat dog horse cow pig sheep goat duck hen goose rabbit mouse rat fox wolf bear lion tiger elephant
giraffe zebra monkey panda koala kangaroo camel donkey deer moose squirrel hedgehog badger otter beaver seal whale
dolphin shark salmon tuna frog toad snake lizard turtle crocodile eagle owl crow sparrow robin swan parrot penguin
ant bee wasp butterfly spider snail worm crab lobster octopus bat mole""".split()
FRUITS = """apple banana orange lemon lime melon cherry peach pear plum grape mango kiwi fig apricot pineapple
strawberry raspberry blueberry coconut papaya""".split()
VEGETABLES = """carrot potato tomato onion garlic cucumber lettuce cabbage spinach pumpkin pepper bean pea leek
radish turnip celery broccoli""".split()
FOODS = """bread,rice,pasta,soup,pizza,cheese,salad,cake,pancakes,noodles,curry,fish,chicken,stew,pie,chocolate,
honey,ice cream,yoghurt,porridge,dumplings,tacos,sushi,olives,nuts""".replace("\n", "").split(",")
DRINKS = "water tea coffee milk juice cocoa lemonade".split()
SPORTS = """football tennis basketball swimming running cycling skiing hockey rugby cricket golf rowing chess
volleyball badminton climbing sailing judo""".split()
HOBBIES = """reading,painting,singing,dancing,cooking,gardening,hiking,fishing,knitting,photography,drawing,baking,
playing chess,playing the guitar,playing the piano,collecting stamps,riding horses,writing poems,watching birds,
building models""".replace("\n", "").split(",")
JOBS = """teacher doctor nurse baker farmer pilot driver cook painter singer writer lawyer judge dentist builder
plumber carpenter engineer gardener librarian waiter tailor sailor soldier scientist student actor dancer
photographer journalist architect butcher florist barber mechanic firefighter postman""".split()
ROOMS = "kitchen bedroom bathroom garden garage attic cellar office hall library".split()
PLACES = """park,beach,forest,market,school,library,museum,station,airport,harbour,hospital,bakery,restaurant,cafe,
theatre,cinema,zoo,farm,village,castle,bridge,river,lake,mountain,island,church,garden,shop,office,hotel,stadium,
playground,bus stop,post office,swimming pool""".replace("\n", "").split(",")
ADJECTIVES = """happy sad old young tall short fast slow kind brave clever quiet loud strong weak rich poor warm cold
hot cool dry wet clean dirty new bright dark heavy light soft hard sweet bitter round square long wide narrow deep
thin thick busy calm lazy tired hungry angry funny serious gentle proud shy lucky careful friendly strange simple
famous empty full early late cheap expensive easy difficult""".split()
NOUNS = """house tree road river stone cloud bird child friend letter story song game garden city street train car
boat plane king queen teacher doctor market school picture flower window door table winter summer morning evening
night day week year hour minute moon sun star sky sea rain snow wind fire water earth forest field hill island
bridge tower wall roof floor kitchen bread milk egg fish sugar salt money gold paper colour number word name
question answer idea dream plan work rule team group party holiday journey family brother sister mother father uncle
aunt cousin neighbour village country world language music book page line circle box key lock wheel engine machine
computer screen button message""".split()
VERBS = dict(
    pair.split(":")
    for pair in """walk:walked play:played jump:jumped cook:cooked clean:cleaned open:opened close:closed
paint:painted call:called help:helped visit:visited watch:watched wash:washed carry:carried study:studied try:tried
stop:stopped plan:planned dance:danced move:moved love:loved use:used live:lived like:liked want:wanted need:needed
look:looked ask:asked answer:answered start:started finish:finished laugh:laughed smile:smiled travel:travelled
go:went come:came see:saw eat:ate drink:drank give:gave take:took make:made find:found buy:bought sell:sold
bring:brought think:thought
run:ran swim:swam sing:sang write:wrote read:read speak:spoke break:broke build:built catch:caught
draw:drew drive:drove fall:fell feel:felt fly:flew forget:forgot get:got grow:grew hear:heard hold:held keep:kept
know:knew leave:left lose:lost meet:met pay:paid ride:rode say:said send:sent sit:sat sleep:slept stand:stood
teach:taught tell:told throw:threw understand:understood wake:woke wear:wore win:won""".split()
)
ADVERBS = "quickly slowly quietly loudly happily sadly carefully early late again today often".split()

OPPOSITES = dict(
    pair.split(":")
    for pair in """hot:cold big:small tall:short fast:slow old:young happy:sad light:dark heavy:light open:closed
full:empty early:late rich:poor strong:weak hard:soft wet:dry clean:dirty high:low near:far new:old good:bad
right:wrong
up:down left:right in:out on:off day:night summer:winter north:south east:west first:last begin:end buy:sell
give:take push:pull win:lose love:hate laugh:cry question:answer friend:enemy black:white inside:outside
above:below before:after always:never everything:nothing yes:no true:false thick:thin wide:narrow deep:shallow
long:short sharp:blunt loud:quiet brave:afraid cheap:expensive easy:difficult safe:dangerous same:different
warm:cool sweet:bitter rough:smooth awake:asleep alive:dead bright:dim busy:idle calm:angry polite:rude""".split()
)
SOUNDS = dict(
    pair.split(":")
    for pair in """dog:woof cat:meow cow:moo sheep:baa pig:oink duck:quack hen:cluck horse:neigh lion:roar
frog:croak bee:buzz owl:hoot snake:hiss crow:caw mouse:squeak donkey:hee-haw wolf:howl""".split()
)
YOUNG = dict(
    pair.split(":")
    for pair in """dog:puppy cat:kitten cow:calf sheep:lamb pig:piglet hen:chick duck:duckling horse:foal goat:kid
lion:cub bear:cub fox:cub frog:tadpole deer:fawn goose:gosling swan:cygnet kangaroo:joey seal:pup owl:owlet""".split()
)
LEGS = {"bird": 2, "dog": 4, "spider": 8, "ant": 6, "bee": 6, "cat": 4, "horse": 4, "snake": 0, "person": 2, "hen": 2}
LEGS |= {"butterfly": 6, "cow": 4, "duck": 2, "fish": 0, "octopus": 8, "table": 4, "wasp": 6, "worm": 0, "sheep": 4}
THING_COLOURS = dict(
    pair.split(":")
    for pair in """banana:yellow lemon:yellow grass:green snow:white milk:white coal:black sky:blue tomato:red
strawberry:red carrot:orange spinach:green blood:red chocolate:brown night:black sun:yellow leaf:green cloud:white
pumpkin:orange cucumber:green salt:white cherry:red lime:green""".split()
)
JOB_WORK = dict(
    pair.split(":")
    for pair in """teacher:teaches children,doctor:helps sick people,baker:bakes bread,farmer:grows food,
pilot:flies planes,driver:drives a car or a bus,cook:prepares meals,painter:paints walls or pictures,
singer:sings songs,writer:writes books,dentist:looks after teeth,builder:builds houses,plumber:repairs pipes,
carpenter:makes things from wood,gardener:looks after plants,librarian:looks after books,waiter:serves food,
tailor:makes clothes,sailor:works on a ship,scientist:studies nature,student:learns at a school,actor:plays in films,
photographer:takes pictures,journalist:writes the news,architect:plans buildings,butcher:sells meat,
florist:sells flowers,barber:cuts hair,mechanic:repairs cars,firefighter:puts out fires,postman:brings letters,
nurse:cares for patients,judge:decides in court,engineer:designs machines""".replace("\n", "").split(",")
)
USES = dict(
    pair.split(":")
    for pair in """hammer:hit nails,knife:cut things,pen:write,broom:sweep the floor,umbrella:stay dry in the rain,
clock:tell the time,lamp:light a room,key:open a lock,phone:call people,camera:take pictures,kettle:boil water,
oven:bake food,bed:sleep,chair:sit,cup:drink,spoon:eat soup,towel:dry yourself,soap:wash your hands,
scissors:cut paper,map:find the way,ladder:climb up,bucket:carry water,needle:sew clothes,ruler:measure length,
telescope:look at the stars,bicycle:ride to places,boat:cross the water,fridge:keep food cold,mirror:see yourself,
wallet:keep money,bag:carry things,book:read,guitar:make music,ball:play games,candle:make light,coat:stay warm,
shovel:dig holes,toothbrush:brush your teeth""".replace("\n", "").split(",")
)
CONTINENTS = {
    "Europe": "France Germany Spain Italy Norway Portugal Austria Ireland Greece Poland Finland Sweden".split(),
    "Asia": "Japan China Vietnam Thailand Indonesia India Iran Iraq Jordan Nepal Cambodia Malaysia".split(),
    "Africa": "Egypt Tunisia Ghana Kenya Senegal Nigeria Morocco Ethiopia".split(),
    "South America": "Peru Ecuador Colombia Chile Argentina Uruguay Brazil".split(),
}
CATEGORIES = {
    "animal": ANIMALS,
    "fruit": FRUITS,
    "vegetable": VEGETABLES,
    "colour": COLOURS,
    "job": JOBS,
    "drink": DRINKS,
    "sport": SPORTS,
}

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November December""".split()
SEASONS = {"winter": (12, 1, 2), "spring": (3, 4, 5), "summer": (6, 7, 8), "autumn": (9, 10, 11)}
ORDINALS = """zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth
fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth twenty-first twenty-second twenty-third
twenty-fourth twenty-fifth twenty-sixth twenty-seventh twenty-eighth twenty-ninth thirtieth thirty-first""".split()
_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()

_ONSETS = "b br c ch cl d dr f fl g gr h j k kl l m n p pr qu r s sh sk st t th tr v w z".split()
_NUCLEI = "a e i o u ai ee ia oo ou ei".split()
_CODAS = ["", "", "", *"n r l s t m k x nd rt st ck sh".split()]
_IRREGULAR_PLURALS = {
    "shelf": "shelves", "knife": "knives", "scarf": "scarves", "mouse": "mice", "leaf": "leaves", "loaf": "loaves",
    "child": "children", "wolf": "wolves", "goose": "geese", "sheep": "sheep", "fish": "fish", "deer": "deer",
    "salmon": "salmon", "moose": "moose", "tuna": "tuna", "person": "people", "potato": "potatoes",
    "tomato": "tomatoes", "mango": "mangoes",
}  # fmt: skip


def number_words(n: int) -> str:
    """English words for 0 <= n <= 9999: 42 -> "forty-two", 305 -> "three hundred and five"."""
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")
    unit, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    rest = n % unit
    head = f"{number_words(n // unit)} {name}"
    if not rest:
        return head
    return f"{head} {'and ' if rest < 100 else ''}{number_words(rest)}"


def suffixed(n: int) -> str:
    """Ordinal in figures: 1 -> "1st", 12 -> "12th", 23 -> "23rd"."""
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def plural(noun: str) -> str:
    """Plural of a (compound) noun; the last word gets the ending."""
    head, _, last = noun.rpartition(" ")
    if last in _IRREGULAR_PLURALS:
        ending = _IRREGULAR_PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh", "z")):
        ending = last + "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        ending = last[:-1] + "ies"
    else:
        ending = last + "s"
    return f"{head} {ending}" if head else ending


def article(noun: str) -> str:
    """The noun with its indefinite article: "a lamp", "an apple"."""
    return ("an " if noun[0] in "aeiouAEIOU" else "a ") + noun


def coined(rng: random.Random) -> str:
    """A pronounceable word that does not exist, so that copying cannot be done from memory."""
    syllables = rng.choice((1, 2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(syllables))
