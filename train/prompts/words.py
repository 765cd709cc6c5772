"""The words of the grammar, by kind. A phrase stands as it is used, without its article."""


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.replace("\n", " ").split(";") if phrase.strip())


COLOURS = _phrases("""
red; crimson; orange; amber; yellow; golden; lime green; green; olive; emerald; teal; turquoise; sky blue; blue;
navy; indigo; violet; purple; magenta; pink; rose; brown; beige; cream; white; silver; gray; charcoal; black;
copper-coloured
""")

MATERIALS = _phrases("""
brass; copper; rusted iron; brushed steel; cast bronze; tarnished silver; oak; walnut; bamboo; driftwood; birch
bark; clear glass; frosted glass; stained glass; white porcelain; cracked porcelain; terracotta; glazed stoneware;
marble; granite; slate; sandstone; red brick; raw concrete; black leather; worn leather; felt; knitted wool; linen;
velvet; denim; silk; paper; cardboard; wicker; cork; wax; amber; ice; jade; coral; bone; translucent plastic;
polished resin
""")

ANIMALS = _phrases("""
fox; red squirrel; hedgehog; badger; otter; brown bear; polar bear; wolf; lynx; snow leopard; tiger; lion; cheetah;
elephant; rhinoceros; giraffe; zebra; antelope; stag; reindeer; moose; bison; highland cow; donkey; draft horse;
foal; goat; sheep; piglet; rabbit; hare; field mouse; bat; sloth; koala; kangaroo; red panda; chimpanzee; gorilla;
lemur; tabby cat; black cat; greyhound; sheepdog; dachshund; puppy; barn owl; eagle; kingfisher; robin; magpie;
crow; heron; flamingo; swan; duckling; rooster; peacock; parrot; penguin; puffin; albatross; hummingbird; tree frog;
toad; newt; chameleon; gecko; tortoise; sea turtle; crocodile; python; octopus; jellyfish; seahorse; goldfish; koi;
manta ray; blue whale; dolphin; seal; walrus; crab; lobster; snail; dragonfly; honeybee; ladybird; moth; monarch
butterfly; beetle
""")
ANIMAL_LOOKS = _phrases("""
old; young; sleepy; curious; wet; dusty; fluffy; thin; plump; shy; proud; scruffy; sleek; lonely; playful; watchful;
resting; startled; tiny; enormous
""")
ANIMAL_DEEDS = _phrases("""
asleep; looking up; looking into the camera; drinking; shaking off water; running; jumping; yawning; hiding;
listening; stretching; turning its head; with its eyes closed; in mid stride; sheltering from the rain; basking in
the sun; digging; with its young; casting a long shadow; seen through leaves
""")

PEOPLE = _phrases("""
fisherman; baker; blacksmith; potter; glassblower; weaver; tailor; shoemaker; carpenter; stonemason; gardener;
farmer; shepherd; beekeeper; winemaker; cook; street vendor; bookseller; librarian; teacher; student; scientist;
surgeon; nurse; engineer; electrician; welder; mechanic; pilot; astronaut; sailor; diver; mountaineer; cyclist;
boxer; fencer; dancer; acrobat; juggler; violinist; cellist; drummer; pianist; painter; sculptor; photographer;
poet; clockmaker; lighthouse keeper; night watchman; postwoman; bus driver; firefighter; market trader; grandmother;
grandfather; child; twin sisters; chess player; archer; rower; skateboarder; calligrapher; puppeteer; archaeologist;
ranger
""")
PERSON_LOOKS = _phrases("""
old; young; tired; cheerful; freckled; bearded; weathered; elegant; barefoot; bespectacled; smiling; thoughtful;
stern; laughing; red-haired; grey-haired; tall; sunburnt; rain-soaked; flour-dusted
""")
PERSON_DEEDS = _phrases("""
at work; having a rest; drinking tea; reading a letter; laughing; looking out of a window; carrying a basket;
talking to a friend; wearing a woollen coat; wearing a straw hat; wearing a yellow raincoat; holding a lantern;
holding an umbrella; with folded arms; with closed eyes; walking a dog; waiting for a train; counting coins; tying a
shoelace; in profile; humming a tune; sharing bread; warming both hands; seen from behind; crossing a puddle
""")

OBJECTS = _phrases("""
teapot; coffee cup; pitcher; bowl; vase; candlestick; oil lamp; lantern; chandelier; mirror; picture frame; pocket
watch; grandfather clock; hourglass; compass; telescope; microscope; globe; chess set; dice; music box; violin;
trumpet; accordion; piano; guitar; drum; typewriter; fountain pen; inkwell; stack of books; open book; suitcase;
backpack; handbag; umbrella; walking stick; boot; slipper; hat; mask; crown; ring; necklace; key; padlock; lever;
gear wheel; spring; anchor; rope ladder; toolbox; hammer; anvil; plough; bucket; watering can; basket; barrel;
chest; armchair; rocking chair; stool; writing desk; bookcase; bird cage; doll's house; rocking horse; spinning top;
kite; toy robot; puppet; radio; gramophone; camera; film projector; telephone; sewing machine; kettle; weighing
scale; mortar and pestle; wind chime; sundial; bell
""")
OBJECT_LOOKS = _phrases("""
small; large; tall; broken; cracked; dusty; polished; antique; miniature; oversized; half-open; overturned; dented;
ornate; plain; hand-painted; folded; hanging; leaning; abandoned; glowing; wrapped
""")

FOODS = _phrases("""
loaf of sourdough; croissant; stack of pancakes; slice of cheesecake; cherry tart; lemon meringue; chocolate cake;
bowl of ramen; plate of sushi; dumplings; tacos; paella; pizza; bowl of lentil soup; ratatouille; roast chicken;
grilled fish; oysters on ice; wheel of cheese; fruit salad; bowl of cherries; halved pomegranate; sliced kiwi; bunch
of grapes; pile of oranges; basket of apples; pears; figs; avocados; artichokes; tomatoes on the vine; pumpkin; red
cabbage; mushrooms; jar of honey; jar of pickles; glass of mint tea; cup of cocoa; cappuccino; glass of red wine;
ice cream cone; macarons
""")
FOOD_LOOKS = _phrases("""
steaming; fresh; golden-brown; glazed; half-eaten; rustic; sugar-dusted; colourful; burnt; frosted
""")

PLANTS = _phrases("""
sunflower; poppy; tulip; iris; peony; dahlia; lavender; foxglove; thistle; dandelion; orchid; water lily; lotus;
wild rose; daffodil; hydrangea; wisteria; ivy; fern; moss; bonsai; cactus; succulent; agave; palm; olive tree; oak;
birch; willow; cherry tree; maple; pine; redwood; mangrove; baobab; apple tree; mushroom ring; pitcher plant; bamboo
grove; reed
""")
PLANT_LOOKS = _phrases("""
wilting; blossoming; frost-covered; dew-covered; wind-bent; lone; potted; ancient; autumnal; bare
""")

VEHICLES = _phrases("""
bicycle; tandem; scooter; motorcycle with a sidecar; vintage car; racing car; camper van; double-decker bus; tram;
steam locomotive; freight train; cable car; tractor; bulldozer; fire engine; rowing boat; sailing ship; fishing
trawler; canal barge; ferry; container ship; submarine; hot-air balloon; airship; biplane; glider; helicopter; space
capsule; moon rover; horse-drawn carriage; sled; cargo bike
""")
VEHICLE_LOOKS = _phrases("""
rusty; brand-new; mud-splashed; overgrown; overloaded; parked; speeding; restored; toy; broken-down
""")

BUILDINGS = _phrases("""
lighthouse; windmill; watermill; farmhouse; log cabin; tree house; cottage with a thatched roof; row of terraced
houses; skyscraper; glass tower; brick factory; power station; water tower; railway station; airport hall; bridge;
aqueduct; castle; cathedral; chapel; pagoda; temple; mosque; amphitheatre; library; theatre; greenhouse;
observatory; market hall; harbour crane; petrol station; diner; igloo; yurt; pueblo; stilt house; clock tower;
spiral staircase; courtyard; ruin
""")
BUILDING_LOOKS = _phrases("""
half-finished; crumbling; whitewashed; snow-covered; flooded; ivy-clad; brightly painted; deserted; floodlit; narrow
""")

LANDSCAPES = _phrases("""
mountain lake; glacier; fjord; canyon; desert of dunes; salt flat; volcano; geyser field; waterfall; river delta;
swamp; tundra; steppe; savannah; rainforest; birch forest; pine forest; bamboo forest; meadow; vineyard; rice
terraces; wheat field; tulip field; orchard; heath; cliff coast; pebble beach; coral reef; tropical island; frozen
pond; cave; harbour town; hill village; city skyline; night market; alley; rooftop garden; subway platform; motorway
junction; shipyard
""")
PATTERNS = _phrases("""
lattice of thin lines; field of dots; chequerboard; zigzag; spiral; maze; mosaic of small tiles; tangle of ribbons;
grid of circles; row of arches; cluster of bubbles; ripple of sand; honeycomb; tartan cloth; patchwork; peeling
paint; marbled paper; cracked mud; frost on a pane; woven rope; brick bond; stack of planks; swirl of ink in water;
oil film on water
""")
FANTASY = _phrases("""
dragon; griffin; unicorn; phoenix; mermaid; giant made of stone; robot gardener; clockwork bird; floating island;
city beneath the sea; castle on a cloud; library without end; forest of glass trees; whale in the sky; fox with a
lantern; moon garden; walking house; paper boat on a sea of stars; wizard's workshop; ice palace; mushroom village;
ghost ship
""")

PLACES = _phrases("""
in a garden; in a workshop; in a kitchen; in an attic; in a cellar; in a library; in a greenhouse; in a train
compartment; in a lighthouse; in a barn; in a museum hall; in a laundry; in a bare room; on a wooden table; on a
windowsill; on a doorstep; on a rooftop; on a balcony; on a pier; on a beach; on a frozen lake; on a cobbled street;
on a bridge; on a mossy rock; on a red carpet; by a river; by the sea; by a campfire; beside a stone wall; beside an
old radiator; beneath a tree; beneath a bridge; under a glass dome; among tall grass; among fallen leaves; among
market stalls; among ruins; at a crossroads; at a bus stop; at a harbour; at the edge of a forest; at the foot of a
mountain; in front of a brick wall; in front of a blue door; in front of a plain gray background; in a snowstorm; in
thick fog; in a puddle's reflection; in the desert; in a bamboo grove; in a flooded street; in an empty car park
""")

LIGHTS = _phrases("""
soft morning light; harsh noon sun; golden evening light; blue hour; moonlight; starlight; candlelight; firelight;
neon glow; street lamp light; overcast light; light through blinds; light through stained glass; light from behind;
light from below; a single spotlight; dappled shade; fog with a faint sun; stormy light; northern lights; the glow
of a screen; snow glare; lantern light; long shadows; deep shadow; sun rays through dust; twilight; rain-washed
light; studio light; sunrise
""")

COMPOSITIONS = _phrases("""
close-up; extreme close-up; wide view; seen from above; seen from below; seen through a window; seen from behind;
centred; off to the left; off to the right; with much empty space; filling the frame; symmetrical; on a diagonal; at
a tilt; framed by an arch; reflected in water; shallow depth of field; everything in focus; silhouetted; in a row;
at eye level; far away; with a blurred foreground; cut off by the frame; in motion blur
""")

STYLES = _phrases("""
photograph; black-and-white photograph; macro photograph; polaroid; film still; long exposure; aerial photograph;
oil painting; watercolour; gouache painting; acrylic painting; pastel drawing; charcoal drawing; pencil sketch; ink
drawing; woodcut; linocut; etching; screen print; travel poster; children's book illustration; comic panel; pixel
art image; flat vector illustration; isometric illustration; low-poly render; clay model; paper collage; embroidery;
mosaic; fresco; stained glass window; botanical illustration; technical drawing; blueprint; ukiyo-e print; art
nouveau poster; cubist painting; impressionist painting; pointillist painting; surrealist painting; minimalist
poster; felt diorama; origami model; 3D render
""")

MOODS = _phrases("""
calm; lively; melancholy; mysterious; cheerful; tense; dreamlike; cosy; bleak; majestic; playful; nostalgic; eerie;
tender; festive; hushed
""")
