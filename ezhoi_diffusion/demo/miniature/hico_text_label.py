"""The miniature's class names and zero-shot splits, under the names EZ-HOI uses.

Differs from the real EZ-HOI: 60 interactions of 10 verbs and 10 objects, three splits.
"""

from ezhoi_diffusion.demo import world

hico_text_label = {
    (verb, obj): sentence for (_, obj, verb), sentence in zip(world.CORRESPONDENCE, world.SENTENCES, strict=True)
}
hico_unseen_index = world.UNSEEN
CORRESPONDENCE = world.CORRESPONDENCE
HOI_IDX_TO_ACT_IDX = [verb for verb, _ in hico_text_label]
HOI_IDX_TO_OBJ_IDX = [obj for _, obj in hico_text_label]
ACT_IDX_TO_ACT_NAME = world.VERBS
obj_to_name = world.OBJECTS
