-- One row per purchase. A line is ` 00001 19970101  1   11.77`: customer, day, compact discs, dollars.
SELECT
    concat('CDNOW-', lpad(CAST(_source_row AS STRING), 6, '0')) AS transaction_id,
    regexp_extract(value, '([0-9]+) +([0-9]{8})', 1) AS customer_id,
    'CD' AS product_id,
    regexp_extract(value, '[0-9]{8} +([0-9]+)', 1) AS quantity,
    regexp_extract(value, '[0-9]{8} +[0-9]+ +([0-9.]+)', 1) AS amount,
    regexp_replace(regexp_extract(value, ' ([0-9]{8}) ', 1), '(....)(..)(..)', '$1-$2-$3') AS timestamp,
    'credit_card' AS payment_method,
    'completed' AS status,
    _delivery, _source_file, _source_row
FROM transactions
