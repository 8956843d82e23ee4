"""Reading of media: bytes of a file become a waveform or patches, or a SampleError with one short stable reason.

A file is taken for what its bytes say, never for what it is called. Nothing else than SampleError comes out of the
readers whatever the bytes are, and nothing stays open. Reasons, with the medium's name before each:

===================== ====================================================================================
``_empty``            no bytes, or not one frame of sound, or no picture
``_unreadable``       not a file of this kind, or of a format that is not read
``_heic``             HEIC, which no library here decodes: convert it to JPEG or AVIF (``image_heic``)
``_damaged``          begins well, then breaks off or cannot be decoded; of a video, more than a fifth of its frames;
                      a table that promises more than there can be
``_too_large``        more pixels in its header than ``media.max_source_pixels``
``_extreme_ratio``    one side more than 200 times the other
``_too_long``         more sound than ``media.max_audio_seconds`` (``audio_too_long``), or more frames than
                      ``media.max_source_frames`` (``video_too_long``)
``_sample_rate``      a sample rate that no recording has (``audio_sample_rate``)
``_not_finite``       NaN, infinite or absurdly large samples (``audio_not_finite``)
``_over_budget``      does not fit in ``max_tokens`` even with the fewest and smallest frames (``video_over_budget``)
``too_many_packets``  more than four million pieces of sound and pictures
``too_long``          more sound than there is room for, where the caller says how much there is
===================== ====================================================================================
"""

from omni_train.data.samples.media.audio import audio_seconds, decoded_seconds, read_audio
from omni_train.data.samples.media.image import read_image
from omni_train.data.samples.media.recognition import kind_of
from omni_train.data.samples.media.video import Video, read_video

__all__ = ["Video", "audio_seconds", "decoded_seconds", "kind_of", "read_audio", "read_image", "read_video"]
