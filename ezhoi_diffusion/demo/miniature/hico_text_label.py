"""The miniature's class names and zero-shot splits, under the names EZ-HOI uses.

Differs from the real EZ-HOI: 128 interactions of 31 verbs and 16 objects, four splits.
"""

from ezhoi_diffusion.demo import vocabulary

hico_text_label = {
    (verb, obj): sentence
    for (_, obj, verb), sentence in zip(vocabulary.CORRESPONDENCE, vocabulary.SENTENCES, strict=True)
}
hico_unseen_index = vocabulary.UNSEEN
CORRESPONDENCE = vocabulary.CORRESPONDENCE
HOI_IDX_TO_ACT_IDX = [verb for verb, _ in hico_text_label]
HOI_IDX_TO_OBJ_IDX = [obj for _, obj in hico_text_label]
ACT_IDX_TO_ACT_NAME = vocabulary.VERBS
obj_to_name = vocabulary.OBJECTS
