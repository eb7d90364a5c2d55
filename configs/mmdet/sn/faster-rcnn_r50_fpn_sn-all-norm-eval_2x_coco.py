# Faster R-CNN R-50 FPN with SN in every norm place, and frozen statistics in the backbone.
_base_ = './faster-rcnn_r50_fpn_sn-all_2x_coco.py'

# the recipe for the inherited BN checkpoint: layers start near the BN whose weights and statistics they load
model = dict(backbone=dict(norm_eval=True))
