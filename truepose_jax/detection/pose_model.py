"""Poses by a person detector and VitPose of transformers: COCO-17 found, OpenPose-18 kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from input_pipeline.annotations.keypoints import from_coco
from input_pipeline.schema import NUM_JOINTS, InputError
from truepose_jax.detection.torch_models import load_model

COCO_JOINTS = 17
PERSON = "person"


class PoseModel:
    """Photos -> joints. Raises InputError at once where a checkpoint does not serve.

    box_score: boxes of people below it are not looked at. joint_score: joints below it are missing.
    """

    def __init__(self, name: str, detector: str, device: str, *, box_score: float = 0.3, joint_score: float = 0.3):
        self._detector, self._detector_processor = load_model(
            "detector", detector, "AutoModelForObjectDetection", device
        )
        people = [i for i, label in self._detector.config.id2label.items() if str(label).lower() == PERSON]
        if not people:
            raise InputError(f"--detector={detector}: has no class '{PERSON}'; take a detector trained on COCO")
        self._person, self._box_score, self._joint_score = people[0], box_score, joint_score
        self._model, self._processor = load_model("pose", name, "VitPoseForPoseEstimation", device)
        if self._model.config.num_labels != COCO_JOINTS:
            raise InputError(
                f"--pose={name}: gives {self._model.config.num_labels} joints; a VitPose of COCO's {COCO_JOINTS} is needed"
            )

    def __call__(self, photos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [h w 3] each -> float32 [18 3] (x, y, visible) each; zeros where there is no person."""
        joints = [np.zeros((NUM_JOINTS, 3), np.float32) for _ in photos]
        boxes = self._boxes(photos)
        found = [i for i, box in enumerate(boxes) if box is not None]
        if not found:
            return joints
        import torch

        size = [[np.array([x0, y0, x1 - x0, y1 - y0], np.float32)] for x0, y0, x1, y1 in (boxes[i] for i in found)]
        inputs: Any = self._processor(images=[photos[i] for i in found], boxes=size, return_tensors="pt")
        inputs = inputs.to(self._model.device)
        if getattr(self._model.config.backbone_config, "num_experts", 1) > 1:
            inputs["dataset_index"] = torch.zeros(
                len(found), dtype=torch.int64, device=self._model.device
            )  # COCO's expert
        with torch.inference_mode():
            outputs = self._model(**inputs)
        for i, (person,) in zip(found, self._processor.post_process_pose_estimation(outputs, boxes=size), strict=True):
            coco = np.zeros((COCO_JOINTS, 3), np.float32)
            coco[:, :2] = person["keypoints"].float().cpu().numpy()
            coco[:, 2] = person["scores"].float().cpu().numpy() >= self._joint_score
            joints[i] = from_coco(coco * coco[:, 2:]).astype(np.float32)
        return joints

    def _boxes(self, photos: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """x0, y0, x1, y1 of the main person of each photo."""
        import torch

        inputs: Any = self._detector_processor(images=list(photos), return_tensors="pt").to(self._detector.device)
        with torch.inference_mode():
            outputs = self._detector(**inputs)
        sizes = [photo.shape[:2] for photo in photos]
        found = self._detector_processor.post_process_object_detection(
            outputs, threshold=self._box_score, target_sizes=sizes
        )  # fmt: skip
        boxes = []
        for people, hw in zip(found, sizes, strict=True):
            mine = people["boxes"][people["labels"] == self._person].float().cpu().numpy()
            boxes.append(main_person(mine, hw))
        return boxes


def main_person(boxes: np.ndarray, hw: tuple[int, int]) -> np.ndarray | None:
    """Of boxes [n 4] (x0, y0, x1, y1) the one with most area, weighed by how near its centre is to the picture's.

    None where there is none with an area inside the picture.
    """
    h, w = hw
    boxes = np.clip(boxes.reshape(-1, 4), 0, [w, h, w, h])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    away = np.hypot(*((centres - [w / 2, h / 2]) / [w / 2, h / 2]).T) / np.sqrt(2)
    weight = area * (1 - 0.9 * away)
    return boxes[weight.argmax()] if len(boxes) and area.max() > 0 else None
