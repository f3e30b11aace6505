//! ggml's element types: numbers, names, and which ones candle can hold.

use candle_core::quantized::GgmlDType;

/// Names of the types that can be loaded, for messages.
pub(super) const SUPPORTED: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K";

/// `(number, name, the type if it can be loaded)` for each type in ggml's `enum ggml_type`.
const TYPES: &[(u32, &str, Option<GgmlDType>)] = &[
    (0, "F32", Some(GgmlDType::F32)),
    (1, "F16", Some(GgmlDType::F16)),
    (2, "Q4_0", Some(GgmlDType::Q4_0)),
    (3, "Q4_1", Some(GgmlDType::Q4_1)),
    (6, "Q5_0", Some(GgmlDType::Q5_0)),
    (7, "Q5_1", Some(GgmlDType::Q5_1)),
    (8, "Q8_0", Some(GgmlDType::Q8_0)),
    (9, "Q8_1", None),
    (10, "Q2_K", Some(GgmlDType::Q2K)),
    (11, "Q3_K", Some(GgmlDType::Q3K)),
    (12, "Q4_K", Some(GgmlDType::Q4K)),
    (13, "Q5_K", Some(GgmlDType::Q5K)),
    (14, "Q6_K", Some(GgmlDType::Q6K)),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", None),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", None),
    (25, "I16", None),
    (26, "I32", None),
    (27, "I64", None),
    (28, "F64", None),
    (29, "IQ1_M", None),
    (30, "BF16", Some(GgmlDType::BF16)),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (39, "MXFP4", None),
];

/// The element type behind ggml's number, if it is one that can be loaded.
pub fn block_type(ggml_type: u32) -> Option<GgmlDType> {
    TYPES.iter().find(|(number, ..)| *number == ggml_type).and_then(|(.., block_type)| *block_type)
}

/// ggml's name of an element type, `type 77` for an unknown one.
pub fn type_name(ggml_type: u32) -> String {
    TYPES
        .iter()
        .find(|(number, ..)| *number == ggml_type)
        .map_or_else(|| format!("type {ggml_type}"), |(_, name, _)| (*name).to_owned())
}

/// ggml's number of an element type that can be loaded.
pub(super) fn type_number(block_type: GgmlDType) -> u32 {
    TYPES.iter().find(|(.., known)| *known == Some(block_type)).map_or(u32::MAX, |(number, ..)| *number)
}
