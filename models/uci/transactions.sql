-- UCI Online Retail and Online Retail II: one row per invoice line.
--
-- Data set: UCI Machine Learning Repository, numbers 352 and 502, as Excel or as the common CSV copies. A workbook is
-- read up to its first sheet: save the second one as a file of its own. Both contain 1 to 9 December 2010.
--
-- Key        Invoice and position in it, since an invoice can have two equal lines. An invoice that comes again, in
--            another file or further down (as in copies that join both sheets), has the same keys and counts once.
-- Amount     Quantity × price in GBP, rounded. Lines of 0.00 are left out: stock adjustments, samples, write-offs.
-- Discounts  `D` lines are negative, so they are returns without a product. `M` (manual) lines are sales without one.
-- Shipping   Left out: POST, DOT, C2.
-- Taxes      Not in the data.
-- Refunds    Lines with a negative amount (cancellations, `C…`) are returns.
-- Left out   Bad debt (invoices `A…`, code B), fees and commissions (AMAZONFEE, BANK CHARGES, CRUK), samples (S),
--            adjustments (ADJUST, ADJUST2) and tests (TEST001, TEST002).
-- Customers  Lines without a customer are of guests.
-- Dates      2009-12-01 07:45:00, or with slashes. Then a file is month first if a second number is above 12, day first
--            if a first number is, and otherwise day first if it pads with zeros.
--
-- source online_retail: online*retail*, uci*, data.csv
-- columns online_retail: Invoice, StockCode, Description, Quantity, InvoiceDate, Price, Customer ID, Country
-- columns online_retail: InvoiceNo, UnitPrice, CustomerID

WITH records AS (
    SELECT
        upper(trim(coalesce(Invoice, InvoiceNo))) AS invoice,
        upper(trim(StockCode)) AS code,
        Quantity AS quantity,
        coalesce(Price, UnitPrice) AS price,
        CAST(round(
            try_cast(Quantity AS INT) * try_cast(coalesce(Price, UnitPrice) AS DECIMAL(12, 4)), 2
        ) AS DECIMAL(12, 2)) AS amount,
        regexp_replace(trim(coalesce(`Customer ID`, CustomerID)), '[.]0$', '') AS customer_id,
        trim(Country) AS country,
        trim(InvoiceDate) AS date_text,
        trim(InvoiceDate) RLIKE '^[0-9]+/[0-9]+/[0-9]+ [0-9]+:[0-9]+(:[0-9]+)?$' AS has_slashes,
        regexp_extract(InvoiceDate, '([0-9]+)/', 1) AS first,
        regexp_extract(InvoiceDate, '/([0-9]+)/', 1) AS second,
        lpad(regexp_extract(InvoiceDate, '/([0-9]+) ', 1), 4, '20') AS year,
        regexp_extract(InvoiceDate, ' ([0-9:]+)', 1) AS time,
        _delivery, _source_file, _source_row
    FROM online_retail
),
date_forms AS (
    SELECT
        _delivery,
        CASE
            WHEN MAX(try_cast(second AS INT)) > 12 THEN false
            WHEN MAX(try_cast(first AS INT)) > 12 THEN true
            ELSE MAX(CASE WHEN first LIKE '0%' THEN 1 ELSE 0 END) = 1
        END AS day_first
    FROM records
    GROUP BY _delivery
),
-- Lines of an invoice that follow each other in the file have the same `block`.
blocks AS (
    SELECT *,
        _source_row - ROW_NUMBER() OVER (PARTITION BY _delivery, invoice ORDER BY _source_row) AS block
    FROM records
),
lines AS (
    SELECT *,
        ROW_NUMBER() OVER (PARTITION BY _delivery, invoice, block ORDER BY _source_row) AS position
    FROM blocks
)
SELECT
    concat(l.invoice, '/', l.position) AS transaction_id,
    l.invoice AS order_id,
    l.customer_id,
    CASE WHEN l.code NOT IN ('D', 'M') THEN l.code END AS product_id,
    l.quantity,
    CASE WHEN l.amount IS NULL THEN l.price ELSE CAST(l.amount AS STRING) END AS amount,
    'GBP' AS currency,
    CASE WHEN l.has_slashes THEN concat(
        l.year, '-',
        lpad(CASE WHEN d.day_first THEN l.second ELSE l.first END, 2, '0'), '-',
        lpad(CASE WHEN d.day_first THEN l.first ELSE l.second END, 2, '0'), ' ',
        CASE WHEN l.time LIKE '_:%' THEN '0' ELSE '' END, l.time,
        CASE WHEN l.time LIKE '%:%:%' THEN '' ELSE ':00' END
    ) ELSE l.date_text END AS timestamp,
    CASE WHEN l.amount < 0 THEN 'returned' ELSE 'completed' END AS status,
    l.country AS location,
    l._delivery, l._source_file, l._source_row
FROM lines l
JOIN date_forms d ON d._delivery = l._delivery
WHERE (l.amount IS NULL OR l.amount <> 0)
    AND coalesce(l.invoice, '') NOT LIKE 'A%'
    AND coalesce(l.code, '') NOT IN (
        'POST', 'DOT', 'C2', 'B', 'AMAZONFEE', 'BANK CHARGES', 'CRUK', 'S', 'ADJUST', 'ADJUST2', 'TEST001', 'TEST002'
    )
