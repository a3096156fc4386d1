"""Word lists for keys, counted words and sentences; common English words."""

from __future__ import annotations

import random

ADJECTIVES = """
amber ancient bitter bold brave bright broad calm careful cheap clean clever cloudy cold common copper crisp curious damp dark
dear deep dense distant double dry dusty eager early easy elder empty even faint fair false famous fancy fast fierce final firm
flat foggy fond formal frank fresh frozen full gentle giant glad golden grand grave great green grim half happy hard harsh heavy
hidden high hollow honest huge humble icy idle inner jolly keen kind large late lazy lean level light little local lone long loose
lost loud low loyal lucky main major mild minor misty modern muddy narrow neat new noble noisy odd old open orange outer pale plain
polite proud pure purple quick quiet rapid rare raw ready rich rigid ripe rough round royal rusty sad safe salty sandy scarce secret
sharp shiny short shy silent silver simple sleepy slim slow small smart smooth soft solid sour square stable steady steep stiff
still stout strange strict strong sturdy subtle sudden sunny sweet swift tall tame tender thick thin tidy tiny tired tough upper
urgent vague vast vivid warm wary weak weary wet wide wild windy wise wooden yellow young
""".split()

NOUNS = """
actor anchor apple arrow artist autumn badge baker barn basket beach bell bird blanket boat bottle branch bread brick bridge
brook brush bucket button cabin candle canvas captain carpet castle cattle cave chair chapel cherry circle cliff clock cloud coach
coast coat corner cotton cousin crane crown curtain dancer desert dinner doctor donkey door dragon drawer driver drum eagle
engine evening fabric falcon farmer feather fence ferry field finger flame flower forest fountain fox frame friend garden gate
glass glove goat grain granite guard guitar hammer harbor harvest hat heron hill holiday horse hotel house island jacket jar
journey judge kettle king kitchen kitten ladder lake lamp lantern leaf lemon letter library lion lizard lock machine maple market
meadow medal melon merchant mill mirror money monkey moon morning mountain mouse museum music needle nephew night north novel
nurse ocean office olive onion orchard otter oven owner oyster paint palace panel paper parade park parrot path pattern pearl
pencil pepper piano picture pigeon pillow pilot pine planet plate plum pocket poet pond porch potato prince puzzle quarry queen
rabbit radio rain raven ribbon river road robin rocket roof rope rose sailor salad sand scarf school seed shadow sheep shelf
shell ship shoe shop shore singer sister sky snow soldier song spider spoon spring stable stair star station stone storm stove
street student sugar summer table tailor teacher temple thread throne tiger timber tower town train tree trumpet tunnel turtle
uncle valley vase velvet village violin voice wagon wall walnut water weaver whale wheat wheel whistle willow window winter wolf
wood wool worker writer yard
""".split()

VERBS = """
admired avoided borrowed built carried changed checked chose cleaned closed collected counted covered crossed described drew
emptied explained filled finished fixed followed found guarded heard held hid kept learned lifted liked locked looked-for made
measured mentioned missed moved needed noticed opened ordered packed painted passed photographed planned prepared protected
pushed reached remembered repaired replaced saved sold stored studied took touched traded visited wanted washed watched weighed
""".split()

ADVERBS = """
again always before-noon carefully early eagerly every-day gladly in-secret in-spring in-silence late-at-night loudly often once
patiently quickly quietly rarely slowly soon twice weekly without-a-word
""".split()

PLACES = """
at the end of the lane|behind the old mill|beside the canal|by the northern road|close to the harbor|in the middle of the square|in
the upper rooms|near the railway station|not far from the border|on the far side of the lake|on the second floor|over the hills|past
the last houses|under the wide bridge|up in the mountains|within sight of the sea
""".replace("\n", " ").strip().split("|")


def draw_compounds(count: int, rng: random.Random) -> list[str]:
    """`count` distinct "brave-otter", or "brave-otter-lamp" where there are too few of these."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    if count <= pairs:
        return [f"{ADJECTIVES[p // len(NOUNS)]}-{NOUNS[p % len(NOUNS)]}" for p in rng.sample(range(pairs), count)]
    return [f"{ADJECTIVES[p // len(NOUNS) % len(ADJECTIVES)]}-{NOUNS[p % len(NOUNS)]}-{NOUNS[p // pairs]}"
            for p in rng.sample(range(pairs * len(NOUNS)), count)]
